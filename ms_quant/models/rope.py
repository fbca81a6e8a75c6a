"""Rotary position embedding: frequencies and tables, in NumPy.

Sources: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071); the llama 3.1 frequency rule and
the linear and dynamic NTK rules as Hugging Face configs spell them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, UnsupportedError

_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


_OPTIONAL = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)


_NEUTRAL = {"attn_factor": 1, "extrapolation_factor": 1, "llama_4_scaling_beta": 0}
_KNOWN = frozenset(["rope_type", "rope_theta", "truncate", "finetuned"]).union(
    _OPTIONAL, _NEUTRAL, *_REQUIRED.values()
)


def unknown_rope_keys(rope: Mapping[str, Any]) -> list[str]:
    """Rotary parameters that are not known here, and not looked at."""
    return sorted(rope.keys() - _KNOWN)


def check_rope(
    rope: dict[str, Any], max_position: int, where: str, head_dim: int = 0
) -> dict[str, Any]:
    """Checks a config's rotary parameters; fills in the original context length.

    Args:
        rope: as :func:`~ms_quant.models.spellings.read_rope` reads them.
        max_position: the longest context.
        where: the file, for errors.
        head_dim: of a family that turns some of a head's channels, how many there are; else 0.
    """
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in _REQUIRED:
        raise UnsupportedError(
            f"{where}: rope_type {kind!r} is not supported, expected one of {', '.join(_REQUIRED)}"
        )
    for key in ("rope_theta", *_REQUIRED[kind]):
        _check_positive(rope.get(key), key, kind, where)
    for key in _OPTIONAL:
        if rope.get(key) is not None:
            _check_positive(rope[key], key, kind, where)
    _check_ranges(rope, where)
    _check_partial(rope.get("partial_rotary_factor"), head_dim, where)
    original = rope.get("original_max_position_embeddings")
    return {**rope, "original_max_position_embeddings": original or max_position}


def _check_positive(value: Any, key: str, kind: str, where: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < 1e30:
        raise BadFileError(
            f"{where}: {key} of the {kind} rotary embedding is {value!r}, "
            "expected a positive number"
        )


def _check_partial(factor: Any, head_dim: int, where: str) -> None:
    if factor in (None, 1):
        return
    if not head_dim:
        raise UnsupportedError(
            f"{where}: partial_rotary_factor {factor!r} is not supported, expected 1.0"
        )
    turned = int(head_dim * factor)
    if not 0 < turned <= head_dim or turned % 2:
        raise BadFileError(
            f"{where}: partial_rotary_factor is {factor!r}, which makes {turned} of {head_dim} "
            "channels of a head, expected a part of them in pairs"
        )


def _check_ranges(rope: dict[str, Any], where: str) -> None:
    if rope["rope_theta"] <= 1:
        raise BadFileError(f"{where}: rope_theta is {rope['rope_theta']!r}, expected more than 1")
    for key, neutral in _NEUTRAL.items():
        if rope.get(key) not in (None, neutral):
            raise BadFileError(
                f"{where}: {key} of the rotary embedding is {rope[key]!r}, expected no such key "
                f"or {neutral}: some runtimes ignore it, and it is not computed here"
            )
    if rope["rope_type"] == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise BadFileError(
            f"{where}: high_freq_factor is {rope['high_freq_factor']!r}, expected more than "
            f"low_freq_factor {rope['low_freq_factor']!r}"
        )


def unrotated_layers(
    raw: Mapping[str, Any], layers: int, skips_rotation: bool, where: str
) -> tuple[int, ...]:
    """Layers without a rotary embedding, by ``no_rope_layers`` or every so many.

    Args:
        raw: the content of ``config.json``, with defaults.
        layers: how many the model has.
        skips_rotation: whether the family has such layers.
        where: the file, for errors.

    Raises:
        MsQuantError: a key is malformed, or the family has no such layers.
    """
    rotated, interval = raw.get("no_rope_layers"), raw.get("no_rope_layer_interval")
    if rotated is None and interval is not None:
        if type(interval) is not int or interval <= 0:
            raise BadFileError(
                f"{where}: no_rope_layer_interval is {interval!r:.80}, expected a positive number"
            )
        rotated = [int((index + 1) % interval != 0) for index in range(layers)]
    if rotated is None or (rotated == [] and not skips_rotation):
        return ()
    if (
        not isinstance(rotated, list)
        or len(rotated) != layers
        or any(type(item) is not int or item not in (0, 1) for item in rotated)
    ):
        raise BadFileError(
            f"{where}: no_rope_layers is {rotated!r:.80}, expected 1 (rotated) or 0 for each of "
            f"{layers} layers"
        )
    found = tuple(index for index, turned in enumerate(rotated) if not turned)
    if found and not skips_rotation:
        raise BadFileError(
            f"{where}: layer {found[0]} has no rotary embedding by no_rope_layers or "
            "no_rope_layer_interval, expected one in every layer of this family: its own class "
            "does not read the key"
        )
    return found


def rope_table(
    rope: dict[str, Any], head_dim: int, positions: np.ndarray, max_position: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines for the given positions.

    Args:
        rope: parameters as ``check_rope`` returns them.
        head_dim: size of one head.
        positions: integer array of shape (S,).
        max_position: ``max_position_embeddings`` of the config (used by the dynamic rule).

    Returns:
        Two float32 arrays of shape (S, head_dim), each half repeating the same frequencies.
    """
    length = int(positions.max()) + 1 if positions.size else 0
    turns, factor = frequencies(rope, head_dim, length, max_position)
    angles = positions.astype(np.float32)[:, None] * turns[None, :]
    angles = np.concatenate([angles, angles], axis=1)
    return (
        (np.cos(angles) * np.float32(factor)).astype(np.float32),
        (np.sin(angles) * np.float32(factor)).astype(np.float32),
    )


def widened(table: tuple[np.ndarray, np.ndarray], head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of whole heads, of tables for the channels that are turned.

    The others come after those in each half, and are not turned.
    """
    cos, sin = table
    half = cos.shape[1] // 2
    still = [(0, 0), (0, head_dim // 2 - half)]
    cos, sin = (
        np.concatenate([np.pad(x[:, :half], still, constant_values=fill)] * 2, axis=1)
        for x, fill in ((cos, 1), (sin, 0))
    )
    return cos, sin


def rotary_order(head_dim: int, rotary: int, interleaved: bool) -> np.ndarray | None:
    """In which order the channels of a head have the two of each pair half a head apart.

    Args:
        head_dim: how many there are.
        rotary: how many of them, the first ones, are turned.
        interleaved: whether the two of a pair are neighbours; else half of ``rotary`` apart.

    Returns:
        The channels, or None where they are in that order.
    """
    if rotary == head_dim and not interleaved:
        return None
    turned, still = np.arange(rotary), np.arange(rotary, head_dim)
    pairs = turned.reshape(-1, 2).T if interleaved else turned.reshape(2, -1)
    return np.concatenate([pairs, still.reshape(2, -1)], axis=1).reshape(-1)


def still_table(table: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines that turn nothing, of the shapes of others."""
    cos, sin = table
    return np.ones_like(cos), np.zeros_like(sin)


def frequencies(
    rope: dict[str, Any], head_dim: int, length: int, max_position: int
) -> tuple[np.ndarray, float]:
    """Inverse frequencies (head_dim / 2,) in float32 and the factor on cos and sin."""
    kind, theta = rope["rope_type"], float(rope["rope_theta"])
    if kind == "dynamic" and length > max_position:
        scale = float(rope["factor"])
        grown = scale * length / max_position - (scale - 1)
        theta *= grown ** (head_dim / (head_dim - 2))
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (np.float32(1) / np.power(np.float32(theta), exponent)).astype(np.float32)
    if kind == "linear":
        return (plain / np.float32(rope["factor"])).astype(np.float32), 1.0
    if kind == "llama3":
        return _llama3(plain, rope), 1.0
    if kind == "yarn":
        return _yarn(plain, rope, head_dim, theta)
    return plain, 1.0


def _llama3(plain: np.ndarray, rope: dict[str, Any]) -> np.ndarray:
    """Long wavelengths are divided by the factor, short ones kept, those between blended."""
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    wavelength = 2 * math.pi / plain
    blend = (original / wavelength - low) / (high - low)
    between = (1 - blend) * plain / factor + blend * plain
    scaled = np.where(wavelength > original / low, plain / factor, plain)
    middle = (wavelength >= original / high) & (wavelength <= original / low)
    return np.where(middle, between, scaled).astype(np.float32)


def _yarn(
    plain: np.ndarray, rope: dict[str, Any], head_dim: int, theta: float
) -> tuple[np.ndarray, float]:
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])

    def boundary(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = boundary(float(rope.get("beta_fast") or 32))
    high = boundary(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    frequencies = plain / factor * ramp + plain * (1 - ramp)
    return frequencies.astype(np.float32), _yarn_attention_factor(rope, factor)


def _yarn_attention_factor(rope: dict[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(float(rope["mscale"])) / mscale(float(rope["mscale_all_dim"]))
    return mscale(1.0)
