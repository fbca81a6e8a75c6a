"""How msModelSlim's checkpoints of all versions differ from ours and mean the same.

docs/ascend_format.md has the table. What of a description changes numbers in a way that is not
read is refused by its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, UnsupportedError, short
from ms_quant.files.reader import Checkpoint
from ms_quant.formats.flat_description import tensor_entries
from ms_quant.formats.format import Leeway
from ms_quant.formats.kv_cache import ATTENTION, CACHE, INT8, OF_ATTENTION, OTHER
from ms_quant.numerics.float_grid import MxFormat
from ms_quant.numerics.linear import QuantizedLinear, Stated, bias_units, folded_bias
from ms_quant.numerics.storage import DTYPES
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.storage import Storage

ALIASES = {"WFP8AFP8_DYNAMIC": "W8A8FP8_DYNAMIC"}
INFORMATIVE = frozenset({"version", "model_quant_type", "group_size", "max_supported_tp"})
EMPTY: tuple[Any, ...] = (None, False, "", {}, [])
ONLINE = (".heads_rotation", ".kronecker_rotation_m", ".kronecker_rotation_n", ".q_rot", ".k_rot")
PACKED_VERSION = "1.0.0"
BF16_STEPS = 2.0**-8  # two roundings to bfloat16, of half a step of 2**-8 each
FLOAT32_STEP = 2.0**-23
SUMMED = 64  # roundings of a pairwise or blocked float32 sum, generously
FLOATS = frozenset(DTYPES)


def describe_difference(
    found: Mapping[str, Any], made: Mapping[str, Any], where: Path
) -> tuple[list[str], list[str]]:
    """What is wrong with a description, and what is odd.

    Raises:
        MsQuantError: a key changes numbers in a way that is not read.
    """
    notes = [text for key, value in found.items() for text in _global(key, value, made, where)]
    if "W4A8_DYNAMIC" in found.values() and found.get("version") != PACKED_VERSION:
        raise BadFileError(
            f"{where}: version is {short(found.get('version'))}, expected {PACKED_VERSION!r} with "
            "W4A8_DYNAMIC: older checkpoints pack its weights otherwise"
        )
    made = {key: made[key] for key in made if not key.endswith(OF_ATTENTION) or key in found}
    defects, odd = tensor_entries(found, made, where, LEEWAY)
    hint = " (vllm-ascend fails with KeyError)"
    tables = ("lm_head.", "embed_tokens.")
    defects = [
        text + hint if "does not name" in text and any(t in text for t in tables) else text
        for text in defects
    ]
    return defects, notes + odd


def _global(key: str, value: Any, made: Mapping[str, Any], where: Path) -> list[str]:
    """Notes on a key that is of no tensor."""
    place = f"{where}: {key}"
    if key.endswith(ONLINE):
        raise BadFileError(f"{place} is a rotation at run time, which is not read, expected none")
    if key.endswith(OF_ATTENTION) and value not in (*EMPTY, made.get(key)):
        raise UnsupportedError(
            f"{place} is {short(value)}: attention is read that is {INT8} with scales of heads"
        )
    if "." in key or key in INFORMATIVE or value in EMPTY or key in (CACHE, OTHER):
        return []
    if key == "metadata" or key == "optional":
        return [_rotation(key, value, place)]
    if key == "is_quarot":
        return [f"{place} is {short(value)}: a rotation in the weights changes no output"]
    if key == ATTENTION and key in made:
        return (
            [] if value == made[key] else [f"{place} is {short(value)}, which older versions say"]
        )
    if key in (ATTENTION, "indexer_quant_type", "reduce_quant_type"):
        raise UnsupportedError(f"{place} is {short(value)}, which is not read here, expected none")
    return [] if key in made else [f"{place} is {short(value)}, a key that is not known here"]


def _rotation(key: str, value: Any, place: str) -> str:
    """What is said of QuaRot: a rotation in the weights is read, one at run time is not."""
    if not isinstance(value, Mapping) or set(value) - {"quarot"}:
        raise BadFileError(f"{place} is {short(value)}, expected nothing or 'quarot'")
    if key == "metadata" and value["quarot"]:
        raise BadFileError(
            f"{place}.quarot is {short(value['quarot'])}: rotations at run time are not read, "
            "expected none"
        )
    return f"{place}.quarot: a rotation in the weights, which changes no output"


def stored(scheme: Scheme, storage: Storage, checkpoint: Checkpoint, path: str) -> Storage:
    """Scales are stored in float32 whatever the model's type is."""
    return storage if isinstance(scheme.weight, MxFormat) else storage.widened()


def stated(
    linear: QuantizedLinear, deq_scale: np.ndarray, quant_bias: np.ndarray, path: str
) -> QuantizedLinear:
    """A linear that is computed with these tensors, which must nearly follow from the others.

    On bfloat16 models msModelSlim multiplies both scales in bfloat16 and divides the bias so, too.

    Args:
        linear: as its other tensors have it; its activation folds the bias.
        deq_scale: float32 (out,).
        quant_bias: int32 (out,).
        path: the linear, for errors.

    Raises:
        MsQuantError: a value is off by more than such roundings explain.
    """
    exact = linear.deq_scale
    off = np.abs(deq_scale.astype(np.float64) - exact) / exact
    _require(off <= BF16_STEPS, f"{path}.deq_scale", f"off by more than {BF16_STEPS:.2%}")
    bias = np.zeros(len(exact)) if linear.bias is None else bias_units(linear.bias, deq_scale)
    alone = linear.quant_bias.astype(np.float64)
    room = 1 + np.abs(bias) * BF16_STEPS + np.abs(alone) * FLOAT32_STEP
    far = np.abs(quant_bias - (alone + bias))
    _require(far <= room, f"{path}.quant_bias", "off by more than rounding to bfloat16 explains")
    if np.array_equal(deq_scale, exact) and np.array_equal(quant_bias, folded_bias(linear, path)):
        return linear
    return replace(linear, stated=Stated(deq_scale, quant_bias, True))


def check_scale_bias(found: np.ndarray, made: np.ndarray, largest: np.ndarray, path: str) -> None:
    """Refuses sums of int4 weights that are further off than the order of adding explains.

    Args:
        found: float32, as stored.
        made: float32, exact to the last bit.
        largest: float32, the sums of magnitudes.
        path: the linear, for errors.

    Raises:
        MsQuantError: says how many are.
    """
    room = np.abs(largest) * (SUMMED * FLOAT32_STEP)
    _require(np.abs(found - made) <= room, f"{path}.scale_bias", "off by more than rounding")


def _require(good: np.ndarray, name: str, what: str) -> None:
    wrong = int(good.size - np.count_nonzero(good))
    if wrong:
        raise BadFileError(
            f"{name}: {wrong} of {good.size} values are {what} from what the other tensors give"
        )


LEEWAY = Leeway(
    types={
        "input_scale": FLOATS,
        "input_offset": FLOATS,
        "deq_scale": FLOATS | {"int64"},
        "weight_scale": FLOATS,
        "weight_offset": FLOATS,
        "scale_bias": FLOATS,
        "bias": FLOATS,
        "left_trans": FLOATS,
        "right_trans": FLOATS,
        "clip_ratio": FLOATS,
        "kv_cache_scale": FLOATS,
        "kv_cache_offset": FLOATS,
        "scale": FLOATS,  # of quantized attention
        "offset": FLOATS | {"int8"},
    },
    extra=frozenset({"weight_scale", "weight_offset"}),
    aliases=ALIASES,
    stored=stored,
    description=describe_difference,
)
