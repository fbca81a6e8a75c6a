"""Attention over some pairs of tokens, by blocks and by a band: the definition of the kernel."""

from __future__ import annotations

import numpy as np

from ms_quant.attention.dense import SCORES_AT_ONCE, scaled_scores, weighted
from ms_quant.attention.layouts import check_kept, check_operands, scale_of
from ms_quant.errors import BadArgumentError

BLOCK_SHAPE = (128, 128)


def block_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float | None = None,
    blocks: np.ndarray | None = None,
    block_shape: tuple[int, int] = BLOCK_SHAPE,
    band: np.ndarray | None = None,
    first: int = 0,
    leading: np.ndarray | None = None,
    order: np.ndarray | None = None,
    kept: np.ndarray | None = None,
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:
    """What each head gives, over the pairs that every condition below keeps.

    Only keys that a block of queries can reach are touched, so time and memory grow with the pairs
    kept. A row that keeps no key gives zeros.

    Args:
        q: float32 (batch, heads, length, size).
        k, v: float32 (batch, heads, keys, size).
        scale: of scores, 1 / sqrt(size) when None.
        blocks: uint8 (batch or 1, heads, query blocks, key blocks); the pair of query i and key j
            counts if the block (i // block_shape[0], j // block_shape[1]) is 1. None: all are.
        block_shape: queries and keys of a block; the last ones may be short.
        band: int64 (heads,), half widths: |i - j| <= band; -1 where a head has no band.
        first: so many leading tokens lie within every band, as queries and as keys.
        leading: int64 (heads,): queries beyond ``first`` see so many leading keys; -1 for all.
        order: int64 (1 or heads, tokens), the token at each place. All of the above then counts
            places; q, k, v, kept and the result have tokens as they come.
        kept: bool (batch, keys), false for keys that are padding.
        threads, isa: for the kernel that has this signature; nothing is done with them here.

    Returns:
        float32 (batch, heads, length, size).

    Raises:
        MsQuantError: shapes do not go together, or a score is not finite.
    """
    check_operands(q, k, v)
    heads, length, size = q.shape[1:]
    factor, padding = scale_of(scale, size), check_kept(kept, len(q), k.shape[2])
    check_blocks(blocks, block_shape, (len(q), heads, length, k.shape[2]))
    widths, reach = check_band(band, heads), check_band(leading, heads, "leading")
    check_order(order, heads, length, k.shape[2])
    step = min(block_shape[0], max(1, SCORES_AT_ONCE // k.shape[2]))
    out = np.empty(q.shape, np.float32)
    for batch, head, start in np.ndindex(len(q), heads, -(-length // step)):
        rows = np.arange(start * step, min((start + 1) * step, length))
        table = None if blocks is None else blocks[batch % len(blocks), head]
        rule = table, block_shape, int(widths[head]), first, int(reach[head])
        keys = _reachable(rows, k.shape[2], *rule[:4])
        keep = pairs_kept(rows, keys, *rule)
        if order is not None:
            tokens = order[head % len(order)]
            rows, keys = tokens[rows], tokens[keys]
        if padding is not None:
            keep &= padding[batch, keys]
        scores = scaled_scores(q[batch, head, rows], k[batch, head, keys], factor)
        out[batch, head, rows] = weighted(scores, v[batch, head, keys], keep)
    return out


def pairs_kept(
    rows: np.ndarray,
    keys: np.ndarray,
    blocks: np.ndarray | None,
    block_shape: tuple[int, int],
    band: int,
    first: int,
    leading: int = -1,
) -> np.ndarray:
    """Which pairs of query places ``rows`` and key places ``keys`` count in one head.

    Args:
        rows, keys: int64 (r,) and (c,).
        blocks: uint8 (query blocks, key blocks) or None.

    Returns:
        bool (r, c).
    """
    keep = np.ones((len(rows), len(keys)), bool)
    if band >= 0:
        apart = rows[:, None].astype(np.int32) - keys.astype(np.int32)
        keep = np.abs(apart, out=apart) <= band
        keep |= (rows < first)[:, None]
        keep |= keys < first
    if blocks is not None:
        keep &= blocks[np.ix_(rows // block_shape[0], keys // block_shape[1])] != 0
    if leading >= 0:
        keep[np.ix_(rows >= first, keys >= leading)] = False
    return keep


def _reachable(
    rows: np.ndarray,
    keys: int,
    blocks: np.ndarray | None,
    block_shape: tuple[int, int],
    band: int,
    first: int,
) -> np.ndarray:
    """The key places that some of neighbouring query places may keep, ascending."""
    reached = np.ones(keys, bool)
    if band >= 0 and rows[0] >= first:
        reached[first : max(first, int(rows[0]) - band)] = False
        reached[max(first, int(rows[-1]) + band + 1) :] = False
    if blocks is not None:
        found = blocks[np.unique(rows // block_shape[0])].any(axis=0)
        reached &= np.repeat(found, block_shape[1])[:keys]
    return np.flatnonzero(reached)


def block_counts(length: int, keys: int, block_shape: tuple[int, int]) -> tuple[int, int]:
    """How many blocks of queries and of keys there are."""
    return -(-length // block_shape[0]), -(-keys // block_shape[1])


def check_blocks(
    blocks: np.ndarray | None, block_shape: tuple[int, int], shape: tuple[int, int, int, int]
) -> None:
    """Refuses blocks that do not go with (batch, heads, length, keys)."""
    if min(block_shape) < 1:
        raise BadArgumentError(f"block_shape: {block_shape}, expected two numbers from 1")
    if blocks is None:
        return
    batch, heads, length, keys = shape
    expected = (heads, *block_counts(length, keys, block_shape))
    if blocks.dtype != np.uint8 or blocks.ndim != 4 or blocks.shape[1:] != expected:
        raise BadArgumentError(
            f"blocks: {blocks.dtype} of shape {blocks.shape}, expected uint8 (1 or batch, "
            f"{', '.join(map(str, expected))})"
        )
    if len(blocks) not in (1, batch):
        raise BadArgumentError(f"blocks: a batch of {len(blocks)}, expected 1 or {batch}")


def check_band(band: np.ndarray | None, heads: int, name: str = "band") -> np.ndarray:
    """Half widths (heads,), -1 for each head when there is no band."""
    widths = np.full(heads, -1, np.int64) if band is None else np.asarray(band)
    if widths.shape != (heads,) or widths.dtype.kind != "i":
        raise BadArgumentError(
            f"{name}: {widths.dtype} of shape {widths.shape}, expected int64 ({heads},)"
        )
    return widths


def check_order(order: np.ndarray | None, heads: int, length: int, keys: int) -> None:
    """Refuses what is not a permutation of the tokens for each head or for all."""
    if order is None:
        return
    if length != keys or order.dtype != np.int64 or order.shape not in ((1, keys), (heads, keys)):
        raise BadArgumentError(
            f"order: {order.dtype} of shape {order.shape} for {length} queries, expected int64 "
            f"(1 or {heads}, {keys})"
        )
    if (np.sort(order, axis=1) != np.arange(keys)).any():
        raise BadArgumentError("order: no permutation, expected each token once")
