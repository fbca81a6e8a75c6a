"""Keys of ``config.json`` that old and new runtimes read in different places.

transformers 5 writes one ``rope_parameters`` and ``dtype``; transformers 4, and vLLM with it,
reads ``rope_theta`` beside ``rope_scaling``, and ``torch_dtype``. A runtime that finds its own
spelling absent takes a default without a word, so what is written says everything in both, and
what is read may not say two things. Values that real files spell in more than one way are read as
one, and written so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ms_quant.errors import BadFileError

ROPE_KEYS = ("rope_parameters", "rope_scaling")
DTYPE_KEYS = ("dtype", "torch_dtype")
AUTO = "auto"
ANYWHERE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""Rotary keys that stand beside the rotary object or in it."""
THETA = 10000.0
READ_BY_OLD = ("rope_theta", "rope_scaling", "torch_dtype")
READ_BY_NEW = ("rope_parameters", "dtype")


QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_NUMBERS = """
hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
vocab_size max_position_embeddings rms_norm_eps rope_theta partial_rotary_factor
original_max_position_embeddings no_rope_layer_interval num_labels sliding_window max_window_layers
factor low_freq_factor high_freq_factor attention_factor beta_fast beta_slow mscale mscale_all_dim
"""
NUMBERS = frozenset(_NUMBERS.split())
"""Keys whose values are numbers, in config.json and in a rotary object."""
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def canonical(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose values are spelled in the one way that is read and written.

    ``"torch.bfloat16"`` becomes ``"bfloat16"`` and a number in quotes the number; an empty
    quantization entry, which says nothing, is left out.
    """
    found = {key: _number(value) if key in NUMBERS else value for key, value in raw.items()}
    for key in ROPE_KEYS:
        if isinstance(found.get(key), dict):
            rope = found[key]
            found[key] = {k: _number(v) if k in NUMBERS else v for k, v in rope.items()}
    for key in DTYPE_KEYS:
        if isinstance(found.get(key), str):
            found[key] = found[key].removeprefix("torch.")
    empty = {key for key in QUANTIZATION_KEYS if key in found and found[key] in (None, {})}
    return {key: value for key, value in found.items() if key not in empty}


def _number(value: Any) -> Any:
    """The number that a text is; anything else as it is."""
    if not isinstance(value, str) or len(value) > 32 or not _DECIMAL.fullmatch(value.strip()):
        return value
    text = value.strip()
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def read_rope(raw: Mapping[str, Any], where: str, theta: float = THETA) -> dict[str, Any]:
    """The rotary parameters, from whichever places they are written in.

    Args:
        raw: the content of ``config.json``.
        where: its file, for errors.
        theta: what transformers takes where no place says it.

    Returns:
        One flat object with ``rope_type`` and ``rope_theta``.

    Raises:
        MsQuantError: two places differ; names both.
    """
    found = {key: _flat(raw[key], f"{where}: {key}") for key in ROPE_KEYS if raw.get(key)}
    shared = {}
    for key in ANYWHERE:
        places = {key: raw.get(key)}
        places |= {f"{place}.{key}": rope.pop(key, None) for place, rope in found.items()}
        value = agreed(places, where)
        if value is not None:
            shared[key] = value
    ropes = list(found.values())
    if len(ropes) == 2 and ropes[0] != ropes[1]:
        raise BadFileError(
            f"{where}: rope_parameters {raw['rope_parameters']!r:.80} and rope_scaling "
            f"{raw['rope_scaling']!r:.80} differ, expected one of them or equal ones"
        )
    rope = {"rope_type": "default", **(ropes[0] if ropes else {}), **shared}
    inside = any("original_max_position_embeddings" in (raw.get(key) or {}) for key in ROPE_KEYS)
    if rope["rope_type"] not in ("yarn", "llama3") and not inside:
        rope.pop("original_max_position_embeddings", None)  # the rule does not read it
    return {"rope_theta": theta, **rope}


def _flat(value: Any, where: str) -> dict[str, Any]:
    """A rotary object with its type under one key, and without keys that say nothing."""
    if not isinstance(value, dict) or any(isinstance(item, dict) for item in value.values()):
        raise BadFileError(f"{where} is {value!r:.80}, expected one flat object for all the layers")
    rope = {key: item for key, item in value.items() if item is not None and key != "type"}
    kind = agreed({"rope_type": value.get("rope_type"), "type": value.get("type")}, where)
    return rope if kind is None else {**rope, "rope_type": kind}


def agreed(places: Mapping[str, Any], where: str) -> Any:
    """The one value of several places, None where none has any.

    Raises:
        MsQuantError: two of them differ; names both.
    """
    given = [(place, value) for place, value in places.items() if value is not None]
    for place, value in given[1:]:
        first, expected = given[0]
        if value != expected:
            raise BadFileError(
                f"{where}: {first} is {expected!r:.80} and {place} is {value!r:.80}, expected one "
                "value: some runtimes read the first, others the second"
            )
    return given[0][1] if given else None


def read_dtype(raw: Mapping[str, Any], where: str) -> Any:
    """The type of the weights by either key, None where neither says it or both leave it open.

    Raises:
        MsQuantError: they differ.
    """
    said = {key: raw.get(key) for key in DTYPE_KEYS}
    return agreed({key: None if value == AUTO else value for key, value in said.items()}, where)


def asks_tensors(raw: Mapping[str, Any], where: str) -> bool:
    """Whether a config says that the tensors say their type."""
    return AUTO in [raw.get(key) for key in DTYPE_KEYS] and read_dtype(raw, where) is None


def rope_spellings(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """Every rotary key of ``config.json`` as :func:`read_rope` has read it, in both spellings.

    ``original_max_position_embeddings`` is not made up: transformers 4.51 takes a factor of its
    own where it is there.
    """
    kind, partial = rope["rope_type"], "partial_rotary_factor"
    inner = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
    spelled: dict[str, Any] = {
        "rope_theta": rope["rope_theta"],
        "rope_parameters": {"rope_type": kind, "rope_theta": rope["rope_theta"], **inner},
    }
    if partial in rope:
        spelled[partial] = rope[partial]
    if kind != "default":
        spelled["rope_scaling"] = {"rope_type": kind, "type": kind, **inner}
    elif "rope_scaling" in raw:
        spelled["rope_scaling"] = None
    return spelled


OLD_THETA, OLD_THETA_OF = 10000.0, frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""What transformers 4 takes for ``rope_theta`` where it is absent, for these model types."""


def spelling_problems(raw: Mapping[str, Any], where: str, strict: bool = True) -> Iterator[str]:
    """What runtimes with transformers 4 would not find in a ``config.json``, one line each.

    transformers 5 reads the old spelling too, so the new one may be absent.

    Args:
        raw: the content.
        where: the file, for errors.
        strict: whether what equals transformers 4's default must be there, too, as we write it.
    """
    rope = read_rope(raw, where)
    default = not strict and raw.get("model_type") in OLD_THETA_OF
    missing = raw.get("rope_theta") is None and not (default and rope["rope_theta"] == OLD_THETA)
    if missing and raw.get("rope_parameters"):
        yield (
            f"{where}: rope_theta is None, expected {rope['rope_theta']!r} as rope_parameters "
            "says: runtimes with transformers 4 read no rope_parameters and take a default"
        )
    if rope["rope_type"] != "default" and not raw.get("rope_scaling"):
        yield (
            f"{where}: rope_scaling is None, expected type {rope['rope_type']!r:.80} as "
            "rope_parameters says: runtimes with transformers 4 read no rope_parameters"
        )
