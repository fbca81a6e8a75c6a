"""What each head of a sparse attention computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ms_quant.attention.block_attention import (
    BLOCK_SHAPE,
    block_counts,
    check_band,
    check_blocks,
    pairs_kept,
)
from ms_quant.attention.orders import inverse
from ms_quant.errors import BadArgumentError

AT_ONCE = 1 << 22  # pairs


@dataclass(frozen=True)
class BlockMask:
    """Which pairs of tokens each head computes: blocks and a band over tokens put in an order.

    A pair counts if its block is 1 and, unless it lies in the band of its head, one of the two is
    among the ``first`` places. Heads with ``leading`` keep other keys out: queries beyond ``first``
    see the leading places alone.

    Attributes:
        orders: int64 (orders, tokens), the token at each place.
        order_of: int64 (heads,), the row of ``orders`` that a head's tokens are put in.
        blocks: uint8 (batch or 1, heads, query blocks, key blocks) over places; None: all.
        block_shape: places of a block.
        band: int64 (heads,), half widths in places, -1 for none; None: no head has a band.
        first: leading places within every band.
        leading: int64 (heads,), -1 for all places; None: all heads see all places.
        names: what each head is, for reports.
    """

    orders: np.ndarray
    order_of: np.ndarray
    blocks: np.ndarray | None = None
    block_shape: tuple[int, int] = BLOCK_SHAPE
    band: np.ndarray | None = None
    first: int = 0
    leading: np.ndarray | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        heads = self.heads
        if len(self.names) not in (0, heads):
            raise BadArgumentError(f"names: {len(self.names)}, expected one of each of {heads}")
        batch = 1 if self.blocks is None else len(self.blocks)
        check_blocks(self.blocks, self.block_shape, (batch, heads, self.tokens, self.tokens))
        check_band(self.band, heads)
        if self.leading is not None and self.blocks is not None:
            alone = self.leading >= 0
            if not self.blocks[:, alone].all() or (check_band(self.band, heads)[alone] >= 0).any():
                raise BadArgumentError(
                    "leading: with blocks or a band of the head, expected neither"
                )

    @property
    def heads(self) -> int:
        return len(self.order_of)

    @property
    def tokens(self) -> int:
        return self.orders.shape[1]

    @property
    def batch(self) -> int:
        """1 when all of a batch have the same blocks."""
        return 1 if self.blocks is None else len(self.blocks)

    def pairs(self, batch: int, head: int, places: np.ndarray) -> np.ndarray:
        """What queries at some places keep: bool (queries, tokens), over places."""
        table = None if self.blocks is None else self.blocks[batch % self.batch, head]
        band = -1 if self.band is None else int(self.band[head])
        keys = np.arange(self.tokens)
        leading = -1 if self.leading is None else int(self.leading[head])
        return pairs_kept(places, keys, table, self.block_shape, band, self.first, leading)

    def rows(self, batch: int, head: int, tokens: np.ndarray) -> np.ndarray:
        """What some query tokens keep: bool (queries, tokens), over tokens as they come."""
        order = self.orders[self.order_of[head]]
        keep = np.empty((len(tokens), self.tokens), bool)
        keep[:, order] = self.pairs(batch, head, inverse(order)[tokens])
        return keep

    def pairs_of_tokens(self) -> np.ndarray:
        """All pairs, bool (batch or 1, heads, tokens, tokens): of short sequences."""
        every = np.arange(self.tokens)
        heads = range(self.heads)
        return np.stack([[self.rows(b, h, every) for h in heads] for b in range(self.batch)])

    def density(self) -> np.ndarray:
        """The share of pairs that are computed, float64 (batch or 1, heads)."""
        found = np.empty((self.batch, self.heads))
        for batch, head in np.ndindex(found.shape):
            found[batch, head] = self._kept_pairs(batch, head) / self.tokens**2
        return found

    def _kept_pairs(self, batch: int, head: int) -> int:
        table = None if self.blocks is None else self.blocks[batch, head]
        band = -1 if self.band is None else int(self.band[head])
        leading = -1 if self.leading is None else int(self.leading[head])
        if leading >= 0:
            return self.first * self.tokens + (self.tokens - self.first) * leading
        if table is None or table.all():
            return _in_band(self.tokens, band if band >= 0 else self.tokens, self.first)
        if band < 0:
            rows, keys = (_sizes(self.tokens, side) for side in self.block_shape)
            return int(rows @ table.astype(np.int64) @ keys)
        step = max(1, AT_ONCE // self.tokens)
        starts = range(0, self.tokens, step)
        places = [np.arange(start, min(start + step, self.tokens)) for start in starts]
        return sum(int(np.count_nonzero(self.pairs(batch, head, part))) for part in places)


def _sizes(tokens: int, side: int) -> np.ndarray:
    """How many places each block has."""
    starts = np.arange(0, tokens, side)
    return np.minimum(side, tokens - starts)


def _in_band(tokens: int, band: int, first: int) -> int:
    rows = np.arange(first, tokens)
    low, high = np.maximum(first, rows - band), np.minimum(tokens, rows + band + 1)
    return first * tokens + int(first * len(rows) + (high - low).sum())


def dense_mask(tokens: int, heads: int) -> BlockMask:
    """All pairs of all heads, tokens as they come."""
    orders = np.arange(tokens)[None]
    return BlockMask(orders, np.zeros(heads, np.int64), names=("dense",) * heads)


def pick(masks: Sequence[BlockMask], choice: np.ndarray) -> BlockMask:
    """Head h as it is in ``masks[choice[h]]``.

    Raises:
        MsQuantError: masks differ in tokens, heads or the shape of blocks.
    """
    if len({(m.tokens, m.heads) for m in masks}) != 1:
        raise BadArgumentError("masks: of several lengths or heads, expected the same of each")
    used = [masks[i] for i in sorted(set(choice.tolist()))]
    used = [_as_blocks(mask, used) for mask in used]
    number = {i: n for n, i in enumerate(sorted(set(choice.tolist())))}
    heads = [(number[int(i)], head) for head, i in enumerate(choice)]
    firsts = {m.first for m in used if m.band is not None or m.leading is not None}
    if len(firsts) > 1:
        raise BadArgumentError(f"masks: {sorted(firsts)} places first, expected the same of each")
    batch = max(mask.batch for mask in used)
    blocks = None
    if used[0].blocks is not None:
        parts = [_of_batch(used[n].blocks, batch)[:, head] for n, head in heads]
        blocks = np.stack(parts, axis=1)
    rows: dict[bytes, int] = {}  # masks may have the same order
    orders = [used[n].orders[used[n].order_of[head]] for n, head in heads]
    order_of = np.array([rows.setdefault(order.tobytes(), len(rows)) for order in orders], np.int64)
    return BlockMask(
        np.stack([np.frombuffer(row, orders[0].dtype) for row in rows]),
        order_of,
        blocks,
        used[0].block_shape,
        _of_heads([mask.band for mask in used], heads),
        firsts.pop() if firsts else 0,
        _of_heads([mask.leading for mask in used], heads),
        tuple(used[n].names[head] if used[n].names else "" for n, head in heads),
    )


def _as_blocks(mask: BlockMask, others: Sequence[BlockMask]) -> BlockMask:
    """The same mask, with blocks of ones where another mask has blocks."""
    shapes = {other.block_shape for other in others if other.blocks is not None}
    if len(shapes) > 1:
        raise BadArgumentError(f"masks: blocks of {sorted(shapes)}, expected one shape")
    if mask.blocks is not None or not shapes:
        return mask
    shape = shapes.pop()
    counts = block_counts(mask.tokens, mask.tokens, shape)
    ones = np.ones((1, mask.heads, *counts), np.uint8)
    return replace(mask, blocks=ones, block_shape=shape)


def _of_batch(blocks: np.ndarray | None, batch: int) -> np.ndarray:
    assert blocks is not None
    return blocks if len(blocks) == batch else np.repeat(blocks, batch, axis=0)


def _of_heads(
    parts: Sequence[np.ndarray | None], heads: Sequence[tuple[int, int]]
) -> np.ndarray | None:
    if all(part is None for part in parts):
        return None
    found = [parts[n] for n, _ in heads]
    return np.array(
        [-1 if part is None else part[head] for part, (_, head) in zip(found, heads, strict=True)],
        np.int64,
    )
