"""Attention on arrays, with grouped key-value heads."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ms_quant import kernels
from ms_quant.budget import BUDGET, Budget
from ms_quant.models.cache import AnyCache, StepCaches

MASKED = -1e30  # finite, so that a row with every key masked stays free of NaN
HIDDEN = -1e29  # masked keys have less, and no weight at all
MANY_QUERIES = 16  # from which the kernel is faster: it packs keys and values first

TAPS = "q", "k", "v"


def causal_mask(
    length: int, attention_mask: np.ndarray | None = None, start: int = 0
) -> np.ndarray:
    """Additive causal mask, with padding keys masked too.

    Args:
        length: number of tokens S.
        attention_mask: optional (B, S) array, 1 for a token and 0 for padding.
        start: the first token that asks.

    Returns:
        float32 (1 or B, 1, S - start, S).
    """
    visible = np.tri(length - start, length, start, dtype=bool)[None, None]
    if attention_mask is not None:
        visible = visible & (np.asarray(attention_mask)[:, None, None, :] != 0)
    return np.where(visible, 0.0, MASKED).astype(np.float32)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    angles: tuple[np.ndarray, np.ndarray],
    mask: np.ndarray,
    cache: AnyCache | None = None,
    threads: int | None = None,
    budget: Budget = BUDGET,
    show: Callable[[str, np.ndarray], None] = lambda tap, x: None,
    order: np.ndarray | None = None,
) -> np.ndarray:
    """What the heads give, of queries and keys before their rotation.

    Args:
        q: float32 (B, S, heads, D).
        k, v: float32 (B, S, kv heads, D).
        angles: cosines and sines of the positions, float32 (S, D).
        mask: additive float32 (B or 1, 1, S, T).
        cache: keeps keys and values, or None.
        threads: at most so many; None for all.
        budget: what bounds its memory.
        show: is shown what attention reads of the new tokens, by the names of ``TAPS``.
        order: of a head's channels, see :func:`~ms_quant.models.rope.rotary_order`.

    Returns:
        float32 (B, S, heads * D).
    """
    batch, length = q.shape[:2]
    turned, keys = (_turned(x, angles, order, threads) for x in (q, k))
    values = np.ascontiguousarray(v.transpose(0, 2, 1, 3))
    for tap, heads in zip(TAPS, (turned, keys, values), strict=True):
        show(tap, heads)
    if isinstance(cache, StepCaches):
        y = cache.attend(turned, keys, values, 1.0 / math.sqrt(q.shape[3]))
        return y.reshape(batch, length, -1)
    if cache is not None:
        keys, values = cache.extend(keys, values)
    return attend(turned, keys, values, mask, threads, budget).reshape(batch, length, -1)


def _turned(
    x: np.ndarray,
    angles: tuple[np.ndarray, np.ndarray],
    order: np.ndarray | None,
    threads: int | None,
) -> np.ndarray:
    """(B, heads, S, D) of (B, S, heads, D), each channel where it was in its head."""
    if order is None:
        return kernels.rope(x, *angles, threads)
    return kernels.rope(x[..., order], *angles, threads)[..., np.argsort(order)]


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray,
    threads: int | None = None,
    budget: Budget = BUDGET,
    scale: float | None = None,
) -> np.ndarray:
    """Attention: of many queries by the kernel, else in NumPy.

    Args:
        q: float32 (B, heads, S, D).
        k: float32 (B, kv heads, T, D).
        v: float32 (B, kv heads, T, E), E at most D.
        mask: additive float32 (B or 1, 1, S, T).
        threads: at most so many; None for all.
        budget: what bounds its memory.
        scale: factor on the scores; None is one over the square root of D.

    Returns:
        float32 (B, S, heads, E), contiguous.
    """
    batch, heads, length, size = q.shape
    scale, made = 1.0 / math.sqrt(size) if scale is None else scale, v.shape[3]
    if length >= MANY_QUERIES and kernels.available():
        wide = v if made == size else np.pad(v, ((0, 0), (0, 0), (0, 0), (0, size - made)))
        y = kernels.attention(q, k, wide, mask[:, 0], scale, threads)
        return np.ascontiguousarray(y[..., :made])
    step = min(budget.queries, max(1, budget.score_bytes // (4 * batch * heads * k.shape[2])))
    y = np.empty((batch, length, heads, made), np.float32)
    for start in range(0, length, step):
        part = slice(start, start + step)
        seen = k.shape[2] if step >= length else _last_seen(mask[:, :, part])
        held = k[:, :, :seen], v[:, :, :seen], mask[:, :, part, :seen]
        y[:, part] = _attend_slice(q[:, :, part], *held, scale, threads).transpose(0, 2, 1, 3)
    return y


def _last_seen(mask: np.ndarray) -> int:
    """How many keys there are up to the last that a query may look at; all if one sees none."""
    visible = mask > HIDDEN
    if not visible.any(axis=-1).all():
        return mask.shape[-1]  # such a query has the mean of all values
    return int(np.flatnonzero(visible.any(axis=(0, 1, 2)))[-1]) + 1


def _attend_slice(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray,
    scale: float,
    threads: int | None,
) -> np.ndarray:
    batch, heads, length, size = q.shape
    kv_heads, total = k.shape[1:3]
    shape = batch, kv_heads, heads // kv_heads * length, size  # heads that share keys are rows
    scores = np.matmul(q.reshape(shape), k.transpose(0, 1, 3, 2))
    rows = scores.reshape(-1, total)
    kernels.masked_softmax(rows, mask[:, 0], scale, threads)
    return np.matmul(scores, v).reshape(batch, heads, length, -1)
