"""Adaptive block-sparse attention (ada_bsa): blocks by the mass of antidiagonal sums of scores.

Eight tokens in a row become one: queries with their order reversed, so that the product with eight
keys sums an antidiagonal of their scores. The softmax over these, summed within a block, is the
block's score; of each row the blocks with the largest scores are kept until they hold a share of
the mass. Tokens beyond the last whole block are zeros, and strides without any token take no part
(open: the vendor's test has whole blocks alone).
"""

from __future__ import annotations

import numpy as np

from ms_quant.attention.bands import check_sparsity
from ms_quant.attention.dense import SCORES_AT_ONCE, probabilities, scaled_scores
from ms_quant.attention.layouts import scale_of
from ms_quant.errors import BadArgumentError

BLOCK = 128
STRIDE = 8
TILE = BLOCK // STRIDE


def ada_bsa_blocks(
    q: np.ndarray,
    k: np.ndarray,
    *,
    sparsity: float = 0.0,
    cdf_threshold: float = 1.0,
    keep_sink: bool = True,
    keep_recent: bool = True,
    scale: float | None = None,
) -> np.ndarray:
    """The blocks of 128 x 128 that are computed.

    Args:
        q, k: float32 (batch, heads, tokens, size).
        sparsity: no more than int((1 - sparsity) * columns) blocks of a row are counted, one at
            least.
        cdf_threshold: the share of a row's score that kept blocks hold, 0 to 1.
        keep_sink, keep_recent: keep the first and the last column. The last one's score is set to
            0 before: it is kept by this alone.

    Returns:
        uint8 (batch, heads, query blocks, key blocks).
    """
    check_sparsity(sparsity)
    if not 0 <= cdf_threshold <= 1:
        raise BadArgumentError(f"cdf_threshold: {cdf_threshold}, expected a share, 0 to 1")
    scores = block_scores(q, k, scale)
    scores[..., -1] = 0
    kept = keep_by_mass(scores, cdf_threshold, sparsity)
    kept[..., 0] |= keep_sink
    kept[..., -1] |= keep_recent
    return kept.astype(np.uint8)


def block_scores(q: np.ndarray, k: np.ndarray, scale: float | None = None) -> np.ndarray:
    """float32 (batch, heads, query blocks, key blocks): softmax mass of each block."""
    factor = scale_of(scale, q.shape[3]) / STRIDE
    real = np.arange(-(-k.shape[2] // BLOCK) * TILE) * STRIDE < k.shape[2]
    shape = (*q.shape[:2], -(-q.shape[2] // BLOCK), len(real) // TILE)
    found = np.empty(shape, np.float32)
    step = max(1, SCORES_AT_ONCE // (TILE * len(real)))  # blocks of queries
    for item, head in np.ndindex(q.shape[:2]):
        keys = _strided(k[item, head], False)
        for start in range(0, shape[2], step):
            rows = q[item, head, start * BLOCK : (start + step) * BLOCK]
            mass = _softmax(_strided(rows, True), keys, None if real.all() else real, factor)
            mass[-(-len(rows) // STRIDE) :] = 0  # strides without any token
            tiles = mass.reshape(-1, TILE, shape[3], TILE)
            found[item, head, start : start + step] = tiles.sum(axis=(1, 3))
    return found


def _strided(x: np.ndarray, reverse: bool) -> np.ndarray:
    """(tokens, size) -> (ceil(tokens / 128) * 16, 8 * size)."""
    if len(x) % BLOCK:
        x = np.pad(x, ((0, -len(x) % BLOCK), (0, 0)))
    whole = x.reshape(-1, STRIDE, x.shape[1])
    return (whole[:, ::-1] if reverse else whole).reshape(len(whole), -1)


def _softmax(
    queries: np.ndarray, keys: np.ndarray, real: np.ndarray | None, scale: float
) -> np.ndarray:
    """float32 (rows, keys), over the keys that are real."""
    p = probabilities(scaled_scores(queries, keys, scale), real)
    p /= p.sum(axis=-1, keepdims=True)
    return p


def keep_by_mass(scores: np.ndarray, cdf_threshold: float, sparsity: float) -> np.ndarray:
    """bool of the shape of scores (..., columns): those at least the cnt-th largest of the row.

    cnt = 1 + how many running sums, from the largest on, are below the threshold's share of the
    row's sum; int((1 - sparsity) * columns) at most, 1 at least.
    """
    columns = scores.shape[-1]
    falling = -np.sort(-scores, axis=-1)
    below = falling.cumsum(axis=-1) < np.float32(cdf_threshold) * scores.sum(axis=-1, keepdims=True)
    count = below.sum(axis=-1, keepdims=True) + 1
    count = np.clip(count, 1, max(1, int((1 - sparsity) * columns)))
    return scores >= np.take_along_axis(falling, count - 1, axis=-1)
