"""Rounding numbers to the type that a checkpoint stores them in."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ms_quant.errors import BadArgumentError

DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def weight_scale_dtype(model_dtype: np.dtype) -> np.dtype:
    """The type of per-token schemes' weight scales: runtimes read bfloat16 ones for bfloat16
    models, else float32."""
    return model_dtype if model_dtype.name == "bfloat16" else DTYPES["float32"]


_WIDENED = {"widened": True}


def widened(dtype: np.dtype) -> np.dtype:
    """The type for scales that are made float32 again before a device sees them.

    It equals the type that is given. Float16's numbers below its smallest normal one are numbers of
    it then: a row of weights below 7.7e-3 has such a scale.
    """
    return np.dtype(dtype, metadata=_WIDENED) if dtype == np.float16 else dtype


def smallest_normal(dtype: np.dtype) -> float:
    """The smallest number that no device takes for 0."""
    found = ml_dtypes.finfo(dtype)
    whole = dtype.metadata is not None and "widened" in dtype.metadata
    return float(found.smallest_subnormal if whole else found.smallest_normal)


def round_up(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The smallest values of ``dtype`` that are at least ``x``.

    Scales are rounded this way, so that what they scale never clips. A value below the type's
    smallest normal number is raised to it: subnormals are flushed to zero on some devices.

    Args:
        x: positive finite float array.
        dtype: bfloat16, float16 or float32.
        name: the tensor's name, for the error.

    Raises:
        MsQuantError: a value is too large for the type.
    """
    wide = np.maximum(np.asarray(x, np.float64), smallest_normal(dtype))
    limit = float(ml_dtypes.finfo(dtype).max)
    if wide.size and wide.max() > limit:
        raise BadArgumentError(
            f"{name}: {wide.max():g} does not fit {dtype.name}, expected at most {limit:g}"
        )
    near = wide.astype(dtype)
    bits: np.ndarray = near.view(np.uint32 if dtype.itemsize == 4 else np.uint16)
    return np.where(near.astype(np.float64) < wide, bits + 1, bits).astype(bits.dtype).view(dtype)


def nearest(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """``x`` rounded to ``dtype``, positive ones within its normal numbers; float32."""
    limits = smallest_normal(dtype), float(ml_dtypes.finfo(dtype).max)
    return np.clip(x, *limits).astype(dtype).astype(np.float32)
