"""W4A8_DYNAMIC's ``scale_bias``, in NumPy; its two-level scales are ``grid.TwoLevelFormat``.

Source: msModelSlim 26.1's V0 and V1 savers, vllm-ascend of 2026-08; docs/numerics.md states them.
"""

from __future__ import annotations

import numpy as np

from ms_quant.errors import BadArgumentError

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
        raise BadArgumentError(f"{name}: {slices} slices do not divide K = {columns}")
    if scale.ndim != 2 or len(scale) != rows or not scale.shape[1] or columns % scale.shape[1]:
        raise BadArgumentError(
            f"{name}: scales of {scale.shape} do not divide codes of {codes.shape}"
        )
    steps = np.repeat(scale.astype(np.float64), columns // scale.shape[1], axis=1)
    parts = (codes * steps).reshape(rows, slices, columns // slices)
    return (8 * parts.sum(axis=2)).astype(np.float32)
