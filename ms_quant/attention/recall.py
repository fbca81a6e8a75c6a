"""How much of the probability mass of each head a mask keeps, measured on some queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ms_quant.attention.dense import probabilities, scaled_scores
from ms_quant.attention.grid import Clip
from ms_quant.attention.layouts import scale_of
from ms_quant.attention.mask import BlockMask
from ms_quant.attention.orders import inverse
from ms_quant.errors import BadArgumentError

ROWS = 64
ROWS_AT_ONCE = 256
GOLDEN = (5**0.5 - 1) / 2


def spread_rows(tokens: int, rows: int) -> np.ndarray:
    """About ``rows`` tokens all over the sequence, ascending; all of them when there are no more.

    Multiples of the golden section, modulo 1: equal steps would meet the same column of each frame.
    """
    if rows >= tokens:
        return np.arange(tokens)
    return np.unique((np.arange(1, rows + 1) * GOLDEN % 1 * tokens).astype(np.int64))


def recall(
    q: np.ndarray,
    k: np.ndarray,
    masks: Sequence[BlockMask],
    *,
    rows: int = ROWS,
    scale: float | None = None,
    kept: np.ndarray | None = None,
) -> np.ndarray:
    """The mean share of a query's probability that lies on pairs a mask keeps.

    Costs rows / tokens of the scores of dense attention.

    Args:
        q, k: float32 (batch, heads, tokens, size).
        rows: how many queries are looked at.
        kept: bool (batch, tokens), false for keys that are padding.

    Returns:
        float64 (masks, heads), the mean over the batch.

    Raises:
        MsQuantError: ``rows`` is below 1.
    """
    if rows < 1:
        raise BadArgumentError(f"rows: {rows}, expected at least one query to look at")
    batch, heads, tokens, size = q.shape
    factor = scale_of(scale, size)
    found, chosen = np.zeros((len(masks), heads)), spread_rows(tokens, rows)
    for start in range(0, len(chosen), ROWS_AT_ONCE):
        part = chosen[start : start + ROWS_AT_ONCE]
        for item, head in np.ndindex(batch, heads):
            p = _distribution(q[item, head, part], k[item, head], factor, kept, item)
            for number, mask in enumerate(masks):
                found[number, head] += _mass(mask, item, head, part, p)
    return found / (batch * len(chosen))


def _distribution(
    q: np.ndarray, k: np.ndarray, scale: float, kept: np.ndarray | None, item: int
) -> np.ndarray:
    p = probabilities(scaled_scores(q, k, scale), None if kept is None else kept[item])
    total = p.sum(axis=-1, keepdims=True)
    p /= np.where(total > 0, total, np.float32(1))
    return p


def _mass(mask: BlockMask, item: int, head: int, tokens: np.ndarray, p: np.ndarray) -> float:
    """The sum of p (queries, tokens) over the pairs of a mask."""
    parts = (mask.band, mask.leading)
    band, leading = (-1 if part is None else int(part[head]) for part in parts)
    order = mask.orders[mask.order_of[head]]
    if mask.blocks is not None and (band >= 0 or leading >= 0):
        return float(np.sum(p, where=mask.rows(item, head, tokens)))
    placed, places = np.take(p, order, axis=1), inverse(order)[tokens]
    if mask.blocks is None:
        return _in_ranges(placed, places, band, leading, mask.first)
    starts = np.arange(0, mask.tokens, mask.block_shape[1])
    by_block = np.add.reduceat(placed, starts, axis=1)
    rows = places // mask.block_shape[0]
    return float((by_block * mask.blocks[item % mask.batch, head, rows]).sum())


def _in_ranges(p: np.ndarray, places: np.ndarray, band: int, leading: int, first: int) -> float:
    """The sum of p (queries, key places): of each query a stretch of keys, and the first ones."""
    count = p.shape[1]
    within, reach = places < first, count if leading < 0 else leading
    first = min(first, reach)
    low, high = np.full(len(places), first), np.full(len(places), reach)
    if band >= 0:
        low, high = np.maximum(low, places - band), np.minimum(high, places + band + 1)
    low[within], high[within] = first, count
    some, start = low < high, np.arange(len(places)) * count
    ends = np.stack([start + low, start + high], axis=1)[some].ravel()
    ends = ends[ends < p.size]  # the last one may end with p
    sums = np.add.reduceat(p.ravel(), ends, dtype=np.float64)[::2] if len(ends) else ends
    return float(sums.sum() + p[:, :first].sum(dtype=np.float64))


def sampled_recall(
    q: np.ndarray, k: np.ndarray, clip: Clip, b: float, scale: float | None = None
) -> np.ndarray:
    """The two estimates of the shipped ARM: of the temporal band, and of the spatial one.

    Local: the tokens of frame 1, among themselves. Of these a temporal head sees its neighbours in
    place, as in the (h w t) order. Global: as many tokens, equally spaced over the frames from 1
    on, which stand for a sequence as it comes. Both count the mass within int(h * w * b) steps.

    Args:
        q, k: float32 (batch, heads, tokens, size).
        clip: of at least two frames.

    Returns:
        float64 (2, heads): local, global; the mean over the batch.
    """
    start, frame = clip.start + clip.frame, clip.frame
    local = np.arange(start, start + frame)
    spaced = start + np.arange(frame) * (clip.frames - 1)
    factor, width = scale_of(scale, q.shape[3]), int(frame * b)
    found = np.zeros((2, q.shape[1]))
    for number, chosen in enumerate((local, spaced)):
        for first in range(0, frame, ROWS_AT_ONCE):
            rows = np.arange(first, min(first + ROWS_AT_ONCE, frame))
            near = np.abs(rows[:, None] - np.arange(frame)) <= width
            for item, head in np.ndindex(q.shape[:2]):
                queries, keys = q[item, head, chosen[rows]], k[item, head, chosen]
                p = _distribution(queries, keys, factor, None, item)
                found[number, head] += np.sum(p, where=near)
    return found / (len(q) * frame)
