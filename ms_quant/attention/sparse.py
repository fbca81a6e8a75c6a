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
    """Attention over the pairs of a mask: tokens are put in order, computed, and put back.

    Args:
        q, k, v: float (batch, heads, tokens, size).
        scale: of scores, 1 / sqrt(size) when None.
        kept: bool (batch, tokens), false for keys that are padding.
        prepare: what becomes of q, k and v in order, as of ``fa_quant.decoded``.
        kernel: what computes :func:`~ms_quant.attention.block_attention.block_attention`; it gets
            contiguous arrays.

    Returns:
        float32 (batch, heads, tokens, size), tokens as they came.

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
    factor = scale_of(scale, q.shape[3])
    out = np.empty(q.shape, np.float32)
    for heads in _groups(mask):
        order = mask.orders[mask.order_of[heads[0]]]
        queries, keys, values = (_placed(x, heads, order) for x in (q, k, v))
        if prepare is not None:
            queries, keys, values = prepare(queries, keys, values, heads)
        shown = None if padding is None else np.ascontiguousarray(padding[:, order])
        found = _in_order(queries, keys, values, mask, heads, factor, shown, kernel)
        found = _placed(found, np.arange(len(heads)), np.argsort(order))
        if len(heads) == mask.heads:
            return found
        out[:, heads] = found
    return out


def _placed(x: np.ndarray, heads: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Some heads with their tokens in an order, contiguous."""
    chosen = x if len(heads) == x.shape[1] else x[:, heads]
    if (order[1:] > order[:-1]).all():  # as they come
        return np.ascontiguousarray(chosen)
    return np.take(chosen, order, axis=2)


def _groups(mask: BlockMask) -> list[np.ndarray]:
    """Heads that one call computes: of one order, and of as many leading keys."""
    leading = np.full(mask.heads, -1) if mask.leading is None else mask.leading
    keys = np.stack([mask.order_of, leading], axis=1)
    return [np.flatnonzero((keys == row).all(axis=1)) for row in np.unique(keys, axis=0)]


def _in_order(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: BlockMask,
    heads: np.ndarray,
    scale: float,
    kept: np.ndarray | None,
    kernel: Kernel,
) -> np.ndarray:
    leading = -1 if mask.leading is None else int(mask.leading[heads[0]])
    if leading < 0:
        return kernel(
            *(q, k, v),
            scale=scale,
            blocks=None if mask.blocks is None else np.ascontiguousarray(mask.blocks[:, heads]),
            block_shape=mask.block_shape,
            band=None if mask.band is None else mask.band[heads],
            first=mask.first,
            kept=kept,
        )
    out = np.empty_like(q)  # two dense calls: what leads sees all, the rest sees what leads
    parts = ((slice(None, mask.first), k.shape[2]), (slice(mask.first, None), leading))
    for rows, keys in parts:
        queries = np.ascontiguousarray(q[:, :, rows])
        if queries.shape[2]:
            seen = (np.ascontiguousarray(x[:, :, :keys]) for x in (k, v))
            shown = None if kept is None else np.ascontiguousarray(kept[:, :keys])
            out[:, :, rows] = kernel(queries, *seen, scale=scale, kept=shown)
    return out
