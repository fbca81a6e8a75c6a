"""What computes attention: the native kernel where it is there, else the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ms_quant import kernels
from ms_quant.attention import block_attention as definition
from ms_quant.attention.operands import QuantizedOperand
from ms_quant.errors import BadArgumentError
from ms_quant.numerics.minifloat import E4M3

Kernel = Callable[..., np.ndarray]
"""With the signature of :func:`~ms_quant.attention.block_attention.block_attention`."""


def block_attention(
    q: np.ndarray | QuantizedOperand,
    k: np.ndarray | QuantizedOperand,
    v: np.ndarray | QuantizedOperand,
    **options: Any,
) -> np.ndarray:
    """As the definition; any of q, k and v may be quantized.

    The native kernel takes another order of sums, so the last bits differ from the definition's.

    Raises:
        MsQuantError: shapes do not go together, or a score is not finite.
    """
    if not kernels.available():
        return definition.block_attention(_values(q), _values(k), _values(v), **options)
    out = kernels.block_attention(_as_taken(q), _as_taken(k), _as_taken(v), **options)
    if not np.isfinite(out).all():
        raise BadArgumentError("scores: q @ k^T * scale overflows float32, expected finite scores")
    return out


def _values(x: np.ndarray | QuantizedOperand) -> np.ndarray:
    return x.values() if isinstance(x, QuantizedOperand) else x


def _as_taken(x: np.ndarray | QuantizedOperand) -> np.ndarray | kernels.Codes:
    """Codes as the kernel reads them; MX exponents and FP4 become numbers before."""
    if not isinstance(x, QuantizedOperand):
        return x
    if x.element not in (None, E4M3) or x.scales.dtype != np.float32:
        return x.values()
    codes, scales = np.ascontiguousarray(x.codes), np.ascontiguousarray(x.scales)
    return kernels.Codes(codes, scales, x.block)
