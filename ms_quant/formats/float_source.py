"""How the tensors of a float model are stored, as ``quantization_config`` of its config.json says.

Two encodings are read as the float model that they stand for: FP8 in blocks (DeepSeek, Kimi-K2,
Qwen3-*-FP8) and packed integers of compressed-tensors (Kimi-K2-Thinking). Which tensors are so
their types tell. In either, and in a float model, experts may be stacked in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ms_quant.errors import BadFileError, MsQuantError, short
from ms_quant.files.encoded import DECODED_METHODS, EncodedCheckpoint
from ms_quant.files.float8_source import find_float8
from ms_quant.files.packed_source import find_packed
from ms_quant.files.reader import Checkpoint
from ms_quant.files.stacked_experts import find_stacked, is_stack
from ms_quant.files.strict_json import read_json
from ms_quant.formats.compressed_tensors.config import PACKED, read_schemes
from ms_quant.formats.compressed_tensors.entry import groups_of
from ms_quant.models.spellings import QUANTIZATION_KEYS
from ms_quant.numerics.activation import ActivationFormat, Float
from ms_quant.numerics.grid import AffineFormat

FLOAT8, _ = DECODED_METHODS
ONLY = {"fmt": (None, "e4m3"), "activation_scheme": (None, "dynamic")}
"""Values of keys that mean what is read here."""


def open_source(directory: Path | str, rename: Callable[[str], str] | None = None) -> Checkpoint:
    """The float tensors of a model directory, decoded where they are stored as codes.

    Args:
        directory: the model directory, whose config was read.
        rename: see :class:`~ms_quant.files.reader.Checkpoint`.

    Raises:
        MsQuantError: the entry of config.json is of another encoding, or a stored tensor is not
            what it says.
    """
    where = Path(directory) / "config.json"
    key, entry = quantization_entry(read_json(where))
    if not key:
        plain = Checkpoint(directory, rename=rename)
        stacked = any(is_stack(name) for name in plain.names)
        return EncodedCheckpoint(directory, find_stacked, rename) if stacked else plain
    method = entry.get("quant_method") if isinstance(entry, Mapping) else entry
    if not isinstance(entry, Mapping) or method not in DECODED_METHODS:
        raise BadFileError(
            f"{where}: has a {key} with quant_method {method!r:.80}, expected a float checkpoint "
            f"or one in {' or '.join(DECODED_METHODS)}; dequantize the model first"
        )
    if method == FLOAT8:
        block = _block(entry, f"{where}: {key}")
        find = partial(find_stacked, find=partial(find_float8, block=block))
        return EncodedCheckpoint(directory, find, rename)
    layout = partial(_layout, entry, where)
    find = partial(find_stacked, find=partial(find_packed, layout=layout))
    return EncodedCheckpoint(directory, find, rename)


def quantization_entry(raw: Mapping[str, Any]) -> tuple[str, Any]:
    """Where a config says how weights are stored, and what; "" where it does not.

    The text model of a larger one may say it in its own part.
    """
    inner = raw.get("text_config")
    parts = {"": raw, "text_config.": inner if isinstance(inner, Mapping) else {}}
    for prefix, part in parts.items():
        for key in QUANTIZATION_KEYS:
            if part.get(key) not in (None, {}):
                return prefix + key, part[key]
    return "", None


def _block(entry: Mapping[str, Any], where: str) -> tuple[int, int]:
    for key, values in ONLY.items():
        if entry.get(key) not in values:
            raise BadFileError(f"{where}.{key} is {short(entry[key])}, expected {values[-1]!r}")
    found = entry.get("weight_block_size")
    sizes = found if isinstance(found, list) else []
    if len(sizes) != 2 or any(type(size) is not int or size <= 0 for size in sizes):
        raise BadFileError(
            f"{where}.weight_block_size is {short(found)}, expected two positive numbers: weights "
            "with one scale for each tensor or row are not read"
        )
    return sizes[0], sizes[1]


def _layout(
    entry: Mapping[str, Any], where: Path, paths: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Bits of a code and size of a group of each packed linear."""
    try:
        for place, group in groups_of(entry):
            if group["format"] != PACKED:
                raise BadFileError(
                    f"{place}.format is {short(group['format'])}, expected {PACKED!r} of a model "
                    "that is read as a float one; dequantize it first"
                )
        schemes = read_schemes(entry, paths)
    except MsQuantError as error:
        raise BadFileError(f"{where}: {error}") from None
    found = {}
    for path in paths:
        scheme = schemes[path]
        if scheme is None:
            raise BadFileError(f"{where}: ignores {path!r}, expected not to: it is stored packed")
        weight = scheme.weight
        if not isinstance(weight, AffineFormat) or not _is_plain(weight, scheme.activation):
            raise BadFileError(
                f"{where}: {path!r} is {scheme.name}, expected symmetric packed weights and float "
                "inputs of a model that is read as a float one"
            )
        found[path] = weight.bits, weight.group_size
    return found


def _is_plain(weight: AffineFormat, activation: ActivationFormat) -> bool:
    return weight.symmetric and isinstance(activation, Float)
