"""RainFusion 2 (rf_v2, rf_v3): blocks are chosen by the attention of their mean query and key."""

from __future__ import annotations

import math

import numpy as np

from ms_quant import kernels
from ms_quant.attention.bands import check_sparsity
from ms_quant.attention.block_attention import BLOCK_SHAPE
from ms_quant.attention.layouts import scale_of


def block_means(x: np.ndarray, size: int, order: np.ndarray | None = None) -> np.ndarray:
    """The mean of each block of ``size`` tokens, the last one over the tokens that it has.

    Args:
        x: float32 (batch, heads, tokens, channels).
        order: int64 (tokens,), the token at each place; None for as they come.

    Returns:
        float32 (batch, heads, ceil(tokens / size), channels).
    """
    if kernels.available() and x.shape[3] > 1 and x.strides[3] == x.itemsize:
        return kernels.block_means(x, size, order)  # the same bits, and no copy in order
    if order is not None:
        x = np.take(x, order, axis=2)
    whole = x.shape[2] - x.shape[2] % size
    blocks = x[:, :, :whole].reshape(*x.shape[:2], -1, size, x.shape[3]).mean(axis=3)
    if whole == x.shape[2]:
        return blocks
    tail = x[:, :, whole:].mean(axis=2, keepdims=True)
    return np.concatenate([blocks, tail], axis=2)


def kept_blocks(columns: int, sparsity: float) -> int:
    """How many of a row's blocks are kept: max(1, ceil(columns * (1 - sparsity))).

    In float64 as the vendor has it: of 10 columns at 0.7 these are 4, as 10 * (1 - 0.7) is a
    little above 3.
    """
    check_sparsity(sparsity)
    return max(1, math.ceil(columns * (1 - sparsity)))


def pooled_blocks(
    q: np.ndarray,
    k: np.ndarray,
    protected: np.ndarray,
    sparsity: float,
    *,
    order: np.ndarray | None = None,
    block_shape: tuple[int, int] = BLOCK_SHAPE,
    scale: float | None = None,
) -> np.ndarray:
    """The blocks that are computed.

    P = softmax(mean q @ mean k^T * scale); of each row the blocks with P at least the keep-th
    largest are kept, ties with it. Rows and columns of blocks with a protected token are kept
    whole. (MindIE-SD counts the text's blocks from the end and may drop a block that the video's
    tail shares with the text's head.)

    Args:
        q, k: float32 (batch, heads, tokens, size).
        protected: bool (tokens,), by place.
        order: int64 (tokens,), the token at each place; None for as they come.

    Returns:
        uint8 (batch, heads, query blocks, key blocks).
    """
    queries, keys = (block_means(x, n, order) for x, n in zip((q, k), block_shape, strict=True))
    scores = queries @ keys.swapaxes(2, 3)
    scores *= np.float32(scale_of(scale, q.shape[3]))
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    columns = p.shape[-1]
    least = columns - kept_blocks(columns, sparsity)
    blocks = p >= np.partition(p, least, axis=-1)[..., least, None]
    return protect(blocks.astype(np.uint8), protected, block_shape)


def protect(blocks: np.ndarray, protected: np.ndarray, block_shape: tuple[int, int]) -> np.ndarray:
    """Sets the rows and columns of blocks that hold a protected token to 1; changes ``blocks``."""
    rows, columns = (_with_any(protected, side) for side in block_shape)
    blocks[..., rows, :] = 1
    blocks[..., columns] = 1
    return blocks


def _with_any(protected: np.ndarray, side: int) -> np.ndarray:
    return np.logical_or.reduceat(protected, np.arange(0, len(protected), side))
