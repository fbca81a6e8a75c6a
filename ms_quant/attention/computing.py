"""What computes attention: the native kernel where it is there, else the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ms_quant import kernels
from ms_quant.attention import block_attention as definition
from ms_quant.attention.dense import check_scores
from ms_quant.attention.operands import QuantizedOperand
from ms_quant.numerics import mx
from ms_quant.numerics.minifloat import E2M1, E4M3, decode, encode

E4M3_OF_E2M1 = encode(decode(np.arange(16, dtype=np.uint8), E2M1), E4M3)
Kernel = Callable[..., np.ndarray]
"""With the signature of :func:`~ms_quant.attention.block_attention.block_attention`."""


def block_attention(
    q: np.ndarray | QuantizedOperand,
    k: np.ndarray | QuantizedOperand,
    v: np.ndarray | QuantizedOperand,
    **options: Any,
) -> np.ndarray:
    """As the definition; any of q, k and v may be quantized, in the order that there is.

    The native kernel takes another order of sums, so the last bits differ from the definition's.

    Raises:
        MsQuantError: shapes do not go together, or a score is not finite.
    """
    if not kernels.available():
        order = options.get("order")
        given = (_values(x, order) for x in (q, k, v))
        return definition.block_attention(*given, **options)
    out = kernels.block_attention(_as_taken(q), _as_taken(k), _as_taken(v), **options)
    check_scores(out)
    return out


def _values(x: np.ndarray | QuantizedOperand, order: np.ndarray | None) -> np.ndarray:
    """Tokens as they come."""
    if not isinstance(x, QuantizedOperand):
        return x
    values = x.values()
    if order is None:
        return values
    return np.take_along_axis(values, np.argsort(order, axis=1)[None, :, :, None], axis=2)


def _as_taken(x: np.ndarray | QuantizedOperand) -> np.ndarray | kernels.Codes:
    """As the kernel reads it: int8 or e4m3, of which all of e2m1 is a part, and float32 scales."""
    if not isinstance(x, QuantizedOperand):
        return x if x.strides[3] == x.itemsize else np.ascontiguousarray(x)
    scales = np.ascontiguousarray(x.scales)
    if scales.dtype == np.uint8:
        scales = np.ldexp(np.float32(1), mx.decode_exponent(scales))
    codes = x.codes if x.element is not E2M1 else E4M3_OF_E2M1[x.codes]
    return kernels.Codes(
        codes if codes.strides[3] == 1 else np.ascontiguousarray(codes), scales, x.block
    )
