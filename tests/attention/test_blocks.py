"""RainFusion 2 and ada_bsa: blocks against loops, golden numbers, what is always kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_attention import slow_pooled_row

from ms_quant import kernels
from ms_quant.attention.ada_bsa import ada_bsa_blocks, block_scores, keep_by_mass
from ms_quant.attention.pooled import block_means, kept_blocks, pooled_blocks
from ms_quant.errors import MsQuantError


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.sampled_from([(4, 4), (4, 8), (3, 5), (128, 128)]), st.integers(0, 9))
def test_pooled_blocks_are_the_loop(tokens, block_shape, seed):
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 2, 2, tokens, 4), np.float32)
    protected, sparsity = rng.random(tokens) < 0.05, float(rng.choice([0, 0.3, 0.75, 1]))
    blocks = pooled_blocks(q, k, protected, sparsity, block_shape=block_shape, scale=2)
    assert blocks.dtype == np.uint8
    rows, columns = (range(0, tokens, side) for side in block_shape)
    keep = max(1, math.ceil(len(columns) * (1 - sparsity)))
    for b, h in np.ndindex(2, 2):
        keys = [k[b, h, c : c + block_shape[1]].mean(axis=0) for c in columns]
        for i, r in enumerate(rows):
            mean = q[b, h, r : r + block_shape[0]].mean(axis=0)
            expected = slow_pooled_row(mean, keys, keep, 2)
            whole = protected[r : r + block_shape[0]].any()
            for j, c in enumerate(columns):
                forced = whole or protected[c : c + block_shape[1]].any()
                assert blocks[b, h, i, j] == (forced or expected[j])


def test_the_mean_of_a_short_block_is_over_its_tokens():
    x = np.arange(5, dtype=np.float32).reshape(1, 1, 5, 1)
    assert block_means(x, 2).ravel().tolist() == [0.5, 2.5, 4]


@pytest.mark.parametrize(
    ("columns", "sparsity", "kept"),
    [
        (10, 0.8, 2),
        (10, 0.7, 4),
        (32, 0.8, 7),
        (32, 0.9, 4),
        (8, 0.5, 4),
        (8, 0, 8),
        (8, 1, 1),
        (1, 0.9, 1),
    ],
)
def test_how_many_blocks_are_kept(columns, sparsity, kept):
    """.219 and .125 of 32 columns at .8 and .9, as the contract measured."""
    assert kept_blocks(columns, sparsity) == kept


def test_ties_are_kept():
    q = np.ones((1, 1, 4, 1), np.float32)
    k = np.array([3, 1, 1, 0], np.float32).reshape(1, 1, 4, 1)
    blocks = pooled_blocks(q, k, np.zeros(4, bool), 0.5, block_shape=(1, 1))
    assert blocks[0, 0].tolist() == [[1, 1, 1, 0]] * 4


def test_a_block_shared_by_video_and_text_is_kept_whole():
    """130 tokens of video, 20 of text: block 1 holds both. The vendor forces the last block alone
    too, but of 250 + 20 tokens only block 2, and drops the 6 of text in block 1."""
    for video in (130, 250):
        tokens = video + 20
        protected = np.arange(tokens) >= video
        rng = np.random.default_rng(video)
        q, k = rng.standard_normal((2, 1, 1, tokens, 8), np.float32)
        blocks = pooled_blocks(q, k, protected, 1.0)[0, 0]
        assert blocks[1:].all()
        assert blocks[:, 1:].all()


def slow_ada_bsa(q, k, scale, threshold, sparsity, sink, recent):
    """Of one head, tokens a multiple of 128."""
    count = len(q) // 8
    scores = np.zeros((count, count))
    for i, j in np.ndindex(count, count):
        for r in range(8):
            scores[i, j] += float(q[8 * i + 7 - r] @ k[8 * j + r]) * scale / 8
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    blocks = count // 16
    table = np.zeros((blocks, blocks))
    for i, j in np.ndindex(blocks, blocks):
        table[i, j] = p[16 * i : 16 * i + 16, 16 * j : 16 * j + 16].sum()
    table[:, -1] = 0
    kept = np.zeros(table.shape, np.uint8)
    for i, row in enumerate(table):
        falling, running, number = sorted(row, reverse=True), 0.0, 1
        for value in falling:
            running += value
            number += running < threshold * row.sum()
        number = max(1, min(number, int((1 - sparsity) * blocks)))
        kept[i] = row >= falling[number - 1]
    kept[:, 0] |= sink
    kept[:, -1] |= recent
    return kept


@pytest.mark.parametrize(
    ("threshold", "sparsity", "sink", "recent"),
    [(0.7, 0, True, True), (0.6, 0.5, False, False), (0.97, 0.3, True, False), (0, 0, False, True)],
)
def test_ada_bsa_is_the_loop(threshold, sparsity, sink, recent):
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 1, 2, 640, 8), np.float32)
    q, k = q + rng.standard_normal((1, 2, 640, 1), np.float32), k * 3
    found = ada_bsa_blocks(
        *(q, k),
        cdf_threshold=threshold,
        sparsity=sparsity,
        keep_sink=sink,
        keep_recent=recent,
    )
    for head in range(2):
        expected = slow_ada_bsa(q[0, head], k[0, head], 8**-0.5, threshold, sparsity, sink, recent)
        np.testing.assert_array_equal(found[0, head], expected)
    assert 0 < found.mean() < 1


@pytest.mark.parametrize("tokens", [1, 100, 128, 131, 300])
def test_ada_bsa_takes_any_length(tokens):
    """Scores of real strides alone: each row's mass is that of its strides."""
    rng = np.random.default_rng(tokens)
    q, k = rng.standard_normal((2, 2, 1, tokens, 4), np.float32)
    scores = block_scores(q, k)
    blocks = -(-tokens // 128)
    assert scores.shape == (2, 1, blocks, blocks)
    strides = [min(16, -(-(tokens - 128 * b) // 8)) for b in range(blocks)]
    np.testing.assert_allclose(
        scores.sum(axis=-1), np.broadcast_to(strides, (2, 1, blocks)), rtol=1e-5
    )
    mask = ada_bsa_blocks(q, k, cdf_threshold=0.5)
    assert mask[..., 0].all()
    assert mask[..., -1].all()


def test_how_much_mass_is_kept_by_hand():
    """Of 5, 3, 1, 1 and a zeroed column 0.75 is reached by two; three at 0.81; sparsity caps."""
    scores = np.array([1, 5, 3, 1, 0], np.float32)
    assert keep_by_mass(scores, 0.75, 0).tolist() == [False, True, True, False, False]
    assert keep_by_mass(scores, 0.81, 0).tolist() == [True, True, True, True, False]  # a tie
    assert keep_by_mass(scores, 0.81, 0.8).tolist() == [False, True, False, False, False]
    assert keep_by_mass(scores, 1.0, 1.0).tolist() == [False, True, False, False, False]


def test_refusals():
    q = np.zeros((1, 1, 8, 4), np.float32)
    with pytest.raises(MsQuantError, match=r"cdf_threshold: 1\.1, expected a share"):
        ada_bsa_blocks(q, q, cdf_threshold=1.1)
    with pytest.raises(MsQuantError, match=r"sparsity: -0\.1"):
        pooled_blocks(q, q, np.zeros(8, bool), -0.1)


@pytest.mark.skipif(not kernels.available(), reason="no C++ compiler at install time")
@pytest.mark.parametrize("size", [2, 7, 128])
@pytest.mark.parametrize("tokens", [1, 127, 300])
@pytest.mark.parametrize("inside", [False, True])
def test_means_of_blocks_are_those_of_numpy(monkeypatch, size, tokens, inside):
    """Bit for bit: masks do not depend on whether the kernels are there."""
    rng = np.random.default_rng(size)
    x = rng.standard_normal((2, 3, tokens, size), np.float32) + 100
    if inside:
        x = np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
    order = rng.permutation(tokens)
    options = ((16, order), (128, None), (1, order))
    found = [block_means(x, *each) for each in options]
    monkeypatch.setattr(kernels, "available", lambda: False)
    for each, native in zip(options, found, strict=True):
        np.testing.assert_array_equal(native, block_means(x, *each))
