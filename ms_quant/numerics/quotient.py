"""Input scales for runtimes that divide a norm's gain by them.

The fused latent attention of MindFormers quantizes with a scale of 1 what a norm with the gain
gain / input_scale gives, rounded to the model's type. A bfloat16 quotient is wrong by up to 0.4 %,
and all codes of a channel with it. Among the values next to a scale is one whose quotient is nearly
exact; the weights are multiplied by the scale that is stored, so another one costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ms_quant.numerics import affine, storage

STEPS = 8


@dataclass(frozen=True)
class ChannelRange:
    """What must not clip.

    Attributes:
        low: float32 (in,), smallest value of each channel.
        high: the same of the largest.
        offset: the zero point.
    """

    low: np.ndarray
    high: np.ndarray
    offset: int

    def held(self, scale: np.ndarray) -> np.ndarray:
        """bool (..., in): whether codes with some scales are within int8."""
        low, high = np.rint(self.low / scale), np.rint(self.high / scale)
        return (low + self.offset >= affine.QMIN) & (high + self.offset <= affine.QMAX)


def quotient_error(gain: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float64: how far gain / scale in a type is from the quotient, as a share of it.

    Args:
        gain: float32, of the norm; rounded to the type first.
        scale: float32, positive, exact in the type.
        dtype: bfloat16, float16 or float32.
    """
    held = gain.astype(dtype).astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        made = (held / scale).astype(dtype).astype(np.float64)
    exact = held.astype(np.float64) / scale
    return np.abs(np.divide(made, exact, out=np.ones_like(exact), where=exact != 0) - 1)


def nearly_exact(
    scale: np.ndarray, gain: np.ndarray, dtype: np.dtype, seen: ChannelRange
) -> np.ndarray:
    """The scales near some by which a norm's gain is divided with the least error.

    Args:
        scale: (in,) of the type, positive.
        gain: float32 (in,), of the norm.
        dtype: bfloat16, float16 or float32.
        seen: what must not clip.

    Returns:
        (in,) of the type: of the values up to ``STEPS`` steps away the one with the smallest error,
        the nearest of several; values that would clip are none.
    """
    kind = np.dtype(np.uint32 if dtype.itemsize == 4 else np.uint16)
    steps = np.array(sorted(range(-STEPS, STEPS + 1), key=abs))
    bits = scale.view(kind).astype(np.int64) + steps[:, None]
    near = np.maximum(bits, 1).astype(kind).view(dtype).astype(np.float32)
    good = np.isfinite(near) & (near >= storage.smallest_normal(dtype))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        error = quotient_error(gain, np.where(good, near, 1), dtype)
        good &= seen.held(near)
    good[0] = True
    best = np.where(good, error, np.inf).argmin(axis=0)
    return near[best, np.arange(len(scale))].astype(dtype)
