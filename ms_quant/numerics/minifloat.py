"""The small floats e4m3fn and e2m1, and float8 with one scale a row, defined in NumPy.

=======  ====  ========  ========  ================  ==============  =======  =============
format   bits  exponent  mantissa  smallest nonzero  least normal    largest  NaN codes
=======  ====  ========  ========  ================  ==============  =======  =============
E4M3     8     4         3         2**-9             2**-6           448      0x7f, 0xff
E2M1     4     2         1         0.5               1               6        none
=======  ====  ========  ========  ================  ==============  =======  =============

Neither has an infinity. A magnitude beyond the largest saturates; the sign is kept, so that -0.0
and negative numbers that round to zero become the code of -0. Codes are uint8; an E2M1 code is in
the low four bits, and :mod:`ms_quant.numerics.pack` packs two to a byte.

Source: OCP 8-bit Floating Point Specification 1.0 (E4M3); OCP Microscaling Formats 1.0 (E2M1).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike

from ms_quant.numerics.affine import check_finite

SMALLEST_ABSMAX = np.float32(1e-12)  # a row's absmax is raised to it, as msModelSlim does


class Rounding(Enum):
    """What becomes of a value between two neighbours of a format.

    ``HALF_AWAY`` is floor(steps + 1/2) of the magnitude in float32, the rule of msModelSlim. Its
    one surprise: 0.49999997 steps, the float32 just below one half, become 1, as that sum is 1.
    """

    HALF_EVEN = "half_even"
    HALF_AWAY = "half_away"


@dataclass(frozen=True)
class Minifloat:
    """A small float format without infinity; ``dtype`` is its ml_dtypes type."""

    dtype: np.dtype
    mantissa_bits: int
    min_exponent: int  # of the smallest normal number; subnormals share its step
    largest: float

    @property
    def max_exponent(self) -> int:
        """The exponent of the largest number: 8 for E4M3, 2 for E2M1."""
        return int(floor_log2(self.largest))


E4M3 = Minifloat(np.dtype(ml_dtypes.float8_e4m3fn), 3, -6, 448.0)
E2M1 = Minifloat(np.dtype(ml_dtypes.float4_e2m1fn), 1, 0, 6.0)


def finite_float32(x: ArrayLike, name: str) -> np.ndarray:
    """``x`` in float32.

    Raises:
        MsQuantError: a value is NaN, infinite, or too large for float32; names the tensor.
    """
    with np.errstate(over="ignore"):
        narrow = np.asarray(x).astype(np.float32, copy=False)
    check_finite(narrow, name)
    return narrow


def floor_log2(x: ArrayLike) -> np.ndarray:
    """The exponent of each positive float32, exactly (no logarithm is taken); -200 for zero.

    Returns:
        int32 array of the shape of ``x``.
    """
    value = np.asarray(x, np.float32)
    return np.where(value > 0, np.frexp(value)[1] - 1, -200).astype(np.int32)


def round_to(x: np.ndarray, format: Minifloat, rounding: Rounding) -> np.ndarray:
    """The value of ``format`` that each number becomes.

    Args:
        x: finite float32 array, any shape.

    Returns:
        float32 array of that shape.
    """
    magnitude = np.minimum(np.abs(x), np.float32(format.largest))
    exponent = np.maximum(floor_log2(magnitude), format.min_exponent) - format.mantissa_bits
    steps = np.ldexp(magnitude, -exponent)  # exact: below 2**(mantissa_bits + 1)
    even = rounding is Rounding.HALF_EVEN
    steps = np.rint(steps) if even else np.floor(steps + np.float32(0.5))
    return np.copysign(np.ldexp(steps, exponent), x)


def encode(
    x: ArrayLike, format: Minifloat, rounding: Rounding = Rounding.HALF_EVEN, name: str = "x"
) -> np.ndarray:
    """Quantizes to codes, saturating.

    Args:
        x: float array, any shape.
        name: the tensor's name, for the error.

    Returns:
        uint8 codes of the shape of ``x``.

    Raises:
        MsQuantError: a value is NaN or infinite.
    """
    values = np.asarray(round_to(finite_float32(x, name), format, rounding))
    return values.astype(format.dtype).view(np.uint8)


def decode(codes: np.ndarray, format: Minifloat, name: str = "codes") -> np.ndarray:
    """The float32 values that codes stand for.

    Args:
        codes: uint8, any shape; an E2M1 code is below 16.
        name: the tensor's name, for the error.

    Raises:
        MsQuantError: a code is a NaN of E4M3.
    """
    values = codes.view(format.dtype).astype(np.float32)
    check_finite(values, name)
    return values


def row_scale(x: ArrayLike, name: str = "x") -> np.ndarray:
    """Float8 scale of each row of a weight, or of each token: max(absmax, 1e-12) / 448.

    Args:
        x: float array (..., K).
        name: the tensor's name, for the error.

    Returns:
        float32 (..., 1), always a normal number.

    Raises:
        MsQuantError: a value is NaN or infinite.
    """
    absmax = np.abs(finite_float32(x, name)).max(axis=-1, keepdims=True, initial=0)
    return np.maximum(absmax, SMALLEST_ABSMAX) / np.float32(E4M3.largest)


def quantize_rows(x: ArrayLike, scale: np.ndarray, name: str = "x") -> np.ndarray:
    """Float8 codes of x / scale, half to even, saturating: W8A8FP8_DYNAMIC's weights and tokens.

    Args:
        x: float array (..., K).
        scale: positive float32 (..., 1), from :func:`row_scale`.
        name: the tensor's name, for the error.

    Returns:
        uint8 E4M3 codes (..., K).

    Raises:
        MsQuantError: a value is NaN or infinite.
    """
    steps = finite_float32(x, name) / scale
    return encode(steps, E4M3, Rounding.HALF_EVEN, name)


def dequantize_rows(codes: np.ndarray, scale: np.ndarray, name: str = "codes") -> np.ndarray:
    """The float32 values that uint8 E4M3 codes (..., K) with scales (..., 1) stand for."""
    return decode(codes, E4M3, name) * scale
