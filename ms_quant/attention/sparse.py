"""Sparse attention: a rule and a grid make a :class:`BlockMask`, and a mask makes outputs."""

from __future__ import annotations

import numpy as np

from ms_quant.attention.computing import Kernel, block_attention
from ms_quant.attention.fa_quant import Prepare
from ms_quant.attention.layouts import check_kept, operands, scale_of
from ms_quant.attention.mask import BlockMask
from ms_quant.errors import BadArgumentError


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: BlockMask,
    *,
    scale: float | None = None,
    kept: np.ndarray | None = None,
    prepare: Prepare | None = None,
    kernel: Kernel = block_attention,
) -> np.ndarray:
    """Attention over the pairs of a mask; nothing but what is quantized is copied in its order.

    Args:
        q, k, v: float (batch, heads, tokens, size).
        scale: of scores, 1 / sqrt(size) when None.
        kept: bool (batch, tokens), false for keys that are padding.
        prepare: quantizes q, k and v, and puts their tokens in order, as ``fa_quant.decoded`` does.
        kernel: what computes :func:`~ms_quant.attention.block_attention.block_attention`; it puts
            tokens in order itself, and quantized operands are in order.

    Returns:
        float32 (batch, heads, tokens, size), tokens as they came; in memory as q.

    Raises:
        MsQuantError: shapes do not go together, or q, k or v holds NaN or infinity.
    """
    q, k, v = operands(q, k, v)
    padding = check_kept(kept, len(q), k.shape[2])
    if (mask.heads, mask.tokens) != q.shape[1:3] or k.shape[2] != mask.tokens:
        raise BadArgumentError(
            f"mask: of {mask.heads} heads and {mask.tokens} tokens, expected {q.shape[1]} "
            f"heads, {q.shape[2]} queries and {k.shape[2]} keys"
        )
    if mask.batch not in (1, len(q)):
        raise BadArgumentError(f"mask: of a batch of {mask.batch}, expected {len(q)}")
    order = None if _as_they_come(mask.orders) else mask.orders
    if order is not None and len(order) > 1:
        order = order[mask.order_of]
    given = (q, k, v) if prepare is None else prepare(q, k, v, order)
    return kernel(
        *given,
        scale=scale_of(scale, q.shape[3]),
        blocks=None if mask.blocks is None else np.ascontiguousarray(mask.blocks),
        block_shape=mask.block_shape,
        band=mask.band,
        first=mask.first,
        leading=mask.leading,
        order=order,
        kept=padding,
    )


def _as_they_come(orders: np.ndarray) -> bool:
    return bool((orders[:, 1:] > orders[:, :-1]).all())
