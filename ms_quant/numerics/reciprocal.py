"""Input scales for runtimes that multiply by a rounded reciprocal instead of dividing.

vllm-ascend holds ``input_scale`` in the model's type, takes 1 / input_scale in that type, too, and
quantizes round(x * reciprocal + offset). A bfloat16 reciprocal is wrong by up to 0.4 %, and all
codes of an input with it, in the same direction. Of the next larger scales some have reciprocals
that are nearly exact, and one a little larger costs next to nothing.
"""

from __future__ import annotations

import numpy as np

from ms_quant.numerics import storage

NEARLY_EXACT = 2.0**-10
"""Every float16 reciprocal keeps to it; in bfloat16 at least one of eight scales in a row does."""
STEPS = 8


def rounded_reciprocal(scale: np.ndarray | np.float32, dtype: np.dtype) -> np.ndarray:
    """float32: 1 / scale as a runtime has it that holds both in a type.

    Args:
        scale: float32, positive; the runtime rounds it to the type first.
        dtype: bfloat16, float16 or float32.
    """
    with np.errstate(over="ignore", divide="ignore", under="ignore"):
        held = np.asarray(scale, np.float32).astype(dtype).astype(np.float32)
        return (np.float32(1) / held).astype(dtype).astype(np.float32)


def reciprocal_error(scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float64: how far a scale times its rounded reciprocal is from 1."""
    return np.abs(scale.astype(np.float64) * rounded_reciprocal(scale, dtype) - 1)


def round_up_for_reciprocal(scale: np.ndarray, dtype: np.dtype, name: str) -> np.float32:
    """The first value of a type from a scale on whose rounded reciprocal is nearly exact.

    Args:
        scale: one positive number.
        dtype: bfloat16, float16 or float32.
        name: the tensor's name, for the error.

    Returns:
        float32, exact in the type; the best of the next ``STEPS`` where none is nearly exact.

    Raises:
        MsQuantError: the scale is too large for the type.
    """
    first = np.asarray(storage.round_up(scale, dtype, name))
    kind = np.uint32 if dtype.itemsize == 4 else np.uint16
    near = (first.view(kind) + np.arange(STEPS + 1, dtype=kind)).view(dtype).astype(np.float32)
    near = near[np.isfinite(near)]
    wrong = reciprocal_error(near, dtype)
    good = np.flatnonzero(wrong <= NEARLY_EXACT)
    return near[good[0] if len(good) else wrong.argmin()]
