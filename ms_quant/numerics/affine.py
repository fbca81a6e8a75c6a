"""Affine int8 and int4 quantization, defined in NumPy.

One pair of functions serves every granularity; the shape of ``scale`` says which:

============  ==================  =======================
granularity   reduced axes of x   shape of scale
============  ==================  =======================
per-tensor    all                 ()
per-channel   all but ``axis``    kept, 1 where reduced
per-token     the last            (..., 1)
============  ==================  =======================

Blocks of any shape, as in per-group scales: :mod:`ms_quant.numerics.groupwise`. Functions are for
int8 unless told otherwise; int4 codes are int8 arrays of -8..7.

The rules, which every other path of this project reproduces bit for bit:

* a symmetric scale is absmax / 127, an asymmetric one (max - min) / 255 over a range that is
  made to include 0; the maximum and minimum are taken in the input's own type, which is exact;
* q = clip(round_half_even(x / scale + zero_point), -128, 127), with a division in float32;
* for int4, 7, 15, -8 and 7 stand in place of 127, 255, -128 and 127;
* a slice whose scale would not be a normal float32, that is all zeros or below 1.5e-36, has
  scale 1: subnormals lose precision and some processors flush them to zero;
* NaN and inf are refused by :func:`check_finite`.

Source: Jacob et al., arXiv 1712.05877; the scale rule is absmax / 127, not range / 255.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ms_quant.errors import BadArgumentError

QMIN, QMAX = -128, 127
LIMITS = {4: (-8, 7), 8: (QMIN, QMAX)}  # bits: smallest and largest code
SMALLEST_SCALE = np.finfo(np.float32).tiny  # the smallest normal float32


def check_finite(x: np.ndarray, name: str) -> None:
    """Refuses NaN and infinity.

    Raises:
        MsQuantError: some value is not finite; names the tensor and counts the values.
    """
    bad = x.size - int(np.count_nonzero(np.isfinite(x)))
    if bad:
        raise BadArgumentError(
            f"{name}: {bad} of {x.size} values are NaN or inf, expected finite ones"
        )


def symmetric_scale(absmax: ArrayLike, largest: float = QMAX) -> np.ndarray:
    """Scale of symmetric quantization.

    Args:
        absmax: largest magnitude of each slice, any shape, at least 0.
        largest: the number that it becomes; 127 for int8, 7 for int4, 6 for E2M1.

    Returns:
        float32 array of the same shape: absmax / largest, and 1 where that is not a normal number.
    """
    return _normal_or_one(np.asarray(absmax, np.float32) / np.float32(largest))


def _normal_or_one(scale: np.ndarray) -> np.ndarray:
    return np.where(scale >= SMALLEST_SCALE, scale, np.float32(1)).astype(np.float32)


def asymmetric_parameters(
    low: ArrayLike, high: ArrayLike, bits: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of asymmetric quantization.

    Args:
        low: smallest value of each slice, any shape.
        high: largest value of each slice, the same shape.
        bits: 8 or 4.

    Returns:
        (scale float32, zero_point int8) of that shape. The range is widened to include 0, so
        zero is always represented exactly, and the zero point is clamped to the codes' range.
    """
    smallest, largest = LIMITS[bits]
    low = np.minimum(np.asarray(low, np.float64), 0.0)
    high = np.maximum(np.asarray(high, np.float64), 0.0)
    scale = _normal_or_one(((high - low) / (largest - smallest)).astype(np.float32))
    zero_point = np.clip(np.rint(smallest - low / scale), smallest, largest).astype(np.int8)
    return scale, zero_point


def quantize(
    x: np.ndarray, scale: ArrayLike, zero_point: ArrayLike = 0, bits: int = 8
) -> np.ndarray:
    """Quantizes to codes of 8 or 4 bits.

    Args:
        x: float array.
        scale: float32, broadcastable to ``x``, positive.
        zero_point: integer, broadcastable to ``x``.
        bits: 8 or 4.

    Returns:
        int8 array of the shape of ``x``.
    """
    return _codes(np.asarray(x, np.float32) / np.asarray(scale, np.float32), zero_point, bits)


def quantize_by(x: np.ndarray, factor: ArrayLike, zero_point: ArrayLike = 0) -> np.ndarray:
    """The same for runtimes that multiply, by a float32 that stands for 1 / scale; int8."""
    return _codes(np.asarray(x, np.float32) * np.asarray(factor, np.float32), zero_point, 8)


def _codes(steps: np.ndarray, zero_point: ArrayLike, bits: int) -> np.ndarray:
    smallest, largest = LIMITS[bits]
    steps += np.asarray(zero_point, np.float32)
    return np.clip(np.rint(steps, out=steps), smallest, largest, out=steps).astype(np.int8)


def dequantize(q: np.ndarray, scale: ArrayLike, zero_point: ArrayLike = 0) -> np.ndarray:
    """The float32 values that codes stand for: (q - zero_point) * scale."""
    return (q.astype(np.float32) - np.asarray(zero_point, np.float32)) * np.asarray(
        scale, np.float32
    )


def per_token_scale(x: np.ndarray) -> np.ndarray:
    """Symmetric scale of each token, shape (..., 1), float32."""
    return symmetric_scale(np.abs(x).max(axis=-1, keepdims=True, initial=0))


def per_channel_scale(weight: np.ndarray, clip: ArrayLike = 1.0) -> np.ndarray:
    """Symmetric scale of each output row of a weight.

    Args:
        weight: (out, in) array.
        clip: factor on each row's range, (out, 1) or a number; below 1 the largest weights clip.

    Returns:
        float32 (out, 1).
    """
    absmax = np.abs(weight).max(axis=1, keepdims=True, initial=0).astype(np.float32)
    return symmetric_scale(absmax * np.asarray(clip, np.float32))


def integer_matmul(qx: np.ndarray, qw: np.ndarray) -> np.ndarray:
    """int8 (..., K) times int8 (N, K), summed exactly, int32 (..., N).

    Computed in float64, which holds every partial sum exactly (|sum| <= K * 2**14 < 2**53).
    """
    return (qx.astype(np.float64) @ qw.astype(np.float64).T).astype(np.int32)
