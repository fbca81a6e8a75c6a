"""W4A8_DYNAMIC's own tensors: ``scale_bias`` and two-level scales, in NumPy.

Source: msModelSlim 26.1's V0 and V1 savers, vllm-ascend of 2026-08; docs/numerics.md states them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ms_quant.errors import MsQuantError
from ms_quant.numerics import affine, groupwise, storage

ROW_PARALLEL_SLICES = 16  # the largest tensor parallel size that the stored sums serve
PROTECTED = 119  # msModelSlim's bound of the int8 weight in between; 7 * 17


def scale_bias(codes: np.ndarray, scale: np.ndarray, name: str, slices: int = 1) -> np.ndarray:
    """8 * sum over in of code * scale, which the kernel adds to its integer product.

    Why, as the algebra suggests: int4 units take an int8 activation as x = 16 * h + (l - 8) + 8
    with the nibbles h in -8..7 and l in 0..15, so sum(x * w) = 16 * sum(h * w)
    + sum((l - 8) * w) + 8 * sum(w), and the last term knows no activation.

    Args:
        codes: int8 (out, in) of -8..7.
        scale: float32 (out, 1), or (out, in / G).
        name: the tensor's name, for errors.
        slices: 1, or 16 for a row-parallel layer (o_proj, down_proj, w2): each rank adds the
            sums of the slices of ``in`` that it owns.

    Returns:
        float32 (out, slices), summed in float64 and rounded once. Per-channel sums are exact
        before that, whatever the order.
    """
    rows, columns = codes.shape
    if slices < 1 or columns % slices:
        raise MsQuantError(f"{name}: {slices} slices do not divide K = {columns}")
    if scale.ndim != 2 or len(scale) != rows or not scale.shape[1] or columns % scale.shape[1]:
        raise MsQuantError(f"{name}: scales of {scale.shape} do not divide codes of {codes.shape}")
    steps = np.repeat(scale.astype(np.float64), columns // scale.shape[1], axis=1)
    parts = (codes * steps).reshape(rows, slices, columns // slices)
    return (8 * parts.sum(axis=2)).astype(np.float32)


@dataclass(frozen=True)
class TwoLevel:
    """A weight in int4 codes with two scales.

    Attributes:
        codes: int8 (out, in), -7..7.
        scale: float32 (out, 1), of the int8 weight in between; ``weight_scale``.
        second: float32 (out, in / G), of the int4 codes; ``weight_scale_second``.
    """

    codes: np.ndarray
    scale: np.ndarray
    second: np.ndarray

    def dequantize(self) -> np.ndarray:
        """float32 (out, in): (code * second) * scale, in this order."""
        by = groupwise.Parameters(self.second, np.zeros(self.second.shape, np.int8), 4)
        return groupwise.dequantize(self.codes, by, "weight") * self.scale

    def scale_bias(self, name: str, slices: int = 1) -> np.ndarray:
        """float32 (out, slices): :func:`scale_bias` with both scales multiplied in float64."""
        both = self.second.astype(np.float64) * self.scale
        return scale_bias(self.codes, both, name, slices)


def quantize_two_level(
    weight: np.ndarray,
    group: int,
    name: str,
    *,
    scale_dtype: np.dtype = storage.DTYPES["float32"],
    largest: int = PROTECTED,
) -> TwoLevel:
    """Per channel to 8 bits, then those codes per group to 4.

    Args:
        weight: float (out, in), finite.
        group: G, which divides in; 256 is usual.
        name: the tensor's name, for errors.
        scale_dtype: type in which both scales are stored; they are rounded up to it before use.
        largest: the int8 code on which a row's largest magnitude lands.
    """
    wide = groupwise.finite(weight, name)
    if wide.ndim != 2:
        raise MsQuantError(f"{name}: shape {wide.shape}, expected two axes")
    scale = affine.symmetric_scale(np.abs(wide).max(axis=1, keepdims=True, initial=0), largest)
    scale = storage.round_up(scale, scale_dtype, f"{name}_scale").astype(np.float32)
    between = affine.quantize(wide, scale)
    by = groupwise.parameters(between, (1, group), name, bits=4)
    second = storage.round_up(by.scale, scale_dtype, f"{name}_scale_second").astype(np.float32)
    codes = groupwise.quantize(between, replace(by, scale=second), name)
    return TwoLevel(codes, scale, second)
