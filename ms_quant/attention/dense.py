"""Dense attention in float32: softmax(q @ k^T * scale) @ v, a few query rows at a time."""

from __future__ import annotations

import numpy as np

from ms_quant.attention.layouts import check_kept, check_operands, scale_of
from ms_quant.errors import BadArgumentError
from ms_quant.numerics.minifloat import E4M3, Rounding, round_to

SCORES_AT_ONCE = 1 << 22  # of one head, float32: 16 MB


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float | None = None,
    mask: np.ndarray | None = None,
    kept: np.ndarray | None = None,
    p_e4m3: bool = False,
) -> np.ndarray:
    """What each head gives. A row that keeps no key gives zeros.

    Args:
        q: float32 (batch, heads, length, size).
        k, v: float32 (batch, heads, keys, size).
        scale: of scores, 1 / sqrt(size) when None.
        mask: bool, broadcastable to (batch, heads, length, keys), true where a pair counts.
        kept: bool (batch, keys), false for keys that are padding.
        p_e4m3: round exp(score - largest of the row) to e4m3 before it meets v; the sum it is
            divided by stays float32. Open: no page says how a device rounds it.

    Returns:
        float32 (batch, heads, length, size).

    Raises:
        MsQuantError: shapes do not go together, or a score is not finite.
    """
    check_operands(q, k, v)
    factor, padding = scale_of(scale, q.shape[3]), check_kept(kept, len(q), k.shape[2])
    pairs = None if mask is None else _broadcast(mask, (*q.shape[:3], k.shape[2]))
    out = np.empty(q.shape, np.float32)
    step = max(1, SCORES_AT_ONCE // k.shape[2])
    for batch, head in np.ndindex(q.shape[:2]):
        for start in range(0, q.shape[2], step):
            rows = slice(start, start + step)
            keep = None if pairs is None else pairs[batch, head, rows]
            if padding is not None:
                keep = padding[batch] if keep is None else keep & padding[batch]
            scores = scaled_scores(q[batch, head, rows], k[batch, head], factor)
            out[batch, head, rows] = weighted(scores, v[batch, head], keep, p_e4m3)
    return out


def scaled_scores(q: np.ndarray, k: np.ndarray, scale: float) -> np.ndarray:
    """float32 (rows, keys): q @ k^T * scale."""
    with np.errstate(over="ignore", invalid="ignore"):
        scores = q @ k.T
        scores *= np.float32(scale)
    return scores


def check_scores(scores: np.ndarray) -> None:
    """Refuses scores, or what was made of them, with NaN or infinity: the largest or the smallest
    is it then, without a mask of their size."""
    if not (np.isfinite(scores.max(initial=0)) and np.isfinite(scores.min(initial=0))):
        raise BadArgumentError("scores: q @ k^T * scale overflows float32, expected finite scores")


def probabilities(scores: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    """exp(score - largest of the row) of the pairs kept, 0 elsewhere; not divided by the sum.

    ``scores`` is overwritten: new arrays of its size would take as long as the exponentials.

    Raises:
        MsQuantError: a score is NaN or infinite.
    """
    check_scores(scores)
    if keep is not None:
        np.copyto(scores, np.float32(-np.inf), where=~keep)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    scores -= np.where(np.isfinite(top), top, np.float32(0))
    return np.exp(scores, out=scores)


def weighted(
    scores: np.ndarray, v: np.ndarray, keep: np.ndarray | None = None, p_e4m3: bool = False
) -> np.ndarray:
    """The mean of v (keys, size) by the softmax of scores (rows, keys) over what is kept."""
    p = probabilities(scores, keep)
    total = p.sum(axis=-1, keepdims=True)
    if p_e4m3:
        p = round_to(p, E4M3, Rounding.HALF_EVEN)
    return p @ v / np.where(total > 0, total, np.float32(1))


def _broadcast(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    found = np.asarray(mask)
    try:
        if found.dtype == np.bool_:
            return np.broadcast_to(found, shape)
    except ValueError:
        pass
    raise BadArgumentError(
        f"mask: {found.dtype} of shape {found.shape}, expected bool that broadcasts to {shape}"
    )
