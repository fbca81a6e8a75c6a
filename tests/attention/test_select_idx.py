"""Indices of blocks against a loop over the pairs of tokens that a mask keeps."""

from __future__ import annotations

import numpy as np
import pytest

from ms_quant.attention.grid import TokenGrid
from ms_quant.attention.mask import BlockMask, dense_mask
from ms_quant.attention.rules import SparseRule, make_mask
from ms_quant.attention.select_idx import select_idx
from ms_quant.errors import MsQuantError

SHAPE, TEXT = (6, 9, 11), 30
TOKENS = 6 * 9 * 11 + TEXT


def some_mask(kind="rf_v2", sparsity=0.7, batch=2):
    q, k = np.random.default_rng(0).standard_normal((2, batch, 3, TOKENS, 16), np.float32)
    grid = TokenGrid.of(SHAPE, TOKENS, TEXT)
    return make_mask(SparseRule(kind, sparsity), q, k, grid)


@pytest.mark.parametrize("sparsity", [0.0, 0.7, 1.0])
def test_they_are_the_pairs_that_are_kept(sparsity):
    mask = some_mask(sparsity=sparsity)
    index, counts = select_idx(mask)
    pairs = mask.pairs_of_tokens()[0]
    pairs = pairs[:, mask.orders[0]][:, :, mask.orders[0]]
    blocks = -(-TOKENS // 128)
    assert index.shape == (blocks, 3, blocks)
    assert counts.shape == (blocks, 3)
    assert index.dtype == counts.dtype == np.int64
    for row in range(blocks):
        for head in range(3):
            block = pairs[head, 128 * row : 128 * row + 128]
            kept = [j for j in range(blocks) if block[:, 128 * j : 128 * j + 128].any()]
            assert counts[row, head] == len(kept)
            assert index[row, head].tolist() == kept + [-1] * (blocks - len(kept))


def test_none_and_all_of_a_row():
    table = np.array([[[[0, 0, 0], [1, 1, 1], [0, 1, 0]]]], np.uint8)
    mask = BlockMask(np.arange(6)[None], np.zeros(1, np.int64), table, (2, 2))
    index, counts = select_idx(mask)
    assert index[:, 0].tolist() == [[-1, -1, -1], [0, 1, 2], [1, -1, -1]]
    assert counts[:, 0].tolist() == [0, 3, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: some_mask("rf_v3"), "mask: of a batch of 2, expected one mask for all"),
        (lambda: dense_mask(5, 2), "mask: of bands or of all pairs, expected blocks"),
        (lambda: some_mask("rf_v1", 0.5), "mask: of bands or of all pairs"),
        (
            lambda: BlockMask(
                np.array([[0, 1], [1, 0]]), np.array([0, 1]), np.ones((1, 2, 1, 1), np.uint8)
            ),
            "mask: 2 orders of tokens, expected the same for all heads",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(MsQuantError, match=message):
        select_idx(make())
