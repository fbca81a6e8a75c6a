"""RainFusion 1: bands token by token, recall in float64, and planted heads at several grids."""

from __future__ import annotations

import math

import numpy as np
import pytest
from slow_attention import planted_heads

from ms_quant.attention import arm as module
from ms_quant.attention.arm import arm
from ms_quant.attention.bands import band_masks, bandwidth, checkerboard_step, half_widths
from ms_quant.attention.grid import Clip, TokenGrid
from ms_quant.attention.mask import BlockMask, pick
from ms_quant.attention.recall import recall, sampled_recall, spread_rows
from ms_quant.attention.rules import SparseRule, make_mask
from ms_quant.errors import MsQuantError

SHAPES = [(8, 8, 8), (5, 6, 10), (9, 8, 8), (16, 5, 7), (21, 6, 10)]
B = 1 - math.sqrt(0.5)


def slow_masks(shape, text, text_first, b, tau):
    """bool (3, tokens, tokens), by what each pair of tokens is."""
    frames, height, width = shape
    frame, video = height * width, frames * height * width
    tokens = video + text
    start = text if text_first else 0
    kept = np.zeros((3, tokens, tokens), bool)
    for i, j in np.ndindex(tokens, tokens):
        a, c = i - start, j - start
        if not (frame <= a < video and frame <= c < video):
            kept[:, i, j] = True  # text or the first frame
            continue
        (ta, pa), (tc, pc) = divmod(a, frame), divmod(c, frame)
        turned = (pa - pc) * (frames - 1) + ta - tc
        limit = int(b * (video - frame))
        board = pc // width % tau == pc % width % tau
        kept[:, i, j] = abs(turned) <= limit, abs(a - c) <= limit, board
    return kept


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize(
    ("shape", "text", "tau"), [((3, 4, 5), 7, 2), ((4, 3, 3), 0, 3), ((1, 2, 3), 2, 2)]
)
def test_masks_are_the_loops(shape, text, tau, text_first):
    tokens = math.prod(shape) + text
    grid = TokenGrid.of(shape, tokens, text, text_first)
    expected = slow_masks(shape, text, text_first, B, tau)
    for mask, kept in zip(band_masks(grid, 2, B, tau), expected, strict=True):
        pairs = mask.pairs_of_tokens()
        np.testing.assert_array_equal(pairs[0, 0], kept)
        np.testing.assert_array_equal(pairs[0, 1], kept)
        np.testing.assert_allclose(mask.density(), kept.mean(), rtol=1e-12)
        some = np.array([0, tokens - 1, tokens // 2])
        np.testing.assert_array_equal(mask.rows(0, 1, some), kept[some])


def test_a_band_leaves_out_what_was_asked_for():
    """Beside the first frame 1 - (1 - b)^2 of the pairs stay, which is 1 - sparsity."""
    for sparsity in (0.0, 0.36, 0.5, 0.8, 1.0):
        grid = TokenGrid.of((40, 8, 8), 2560)
        temporal, spatial, _ = band_masks(grid, 1, bandwidth(sparsity))
        first = 1 - (39 / 40) ** 2
        expected = first + (1 - first) * (1 - sparsity)
        np.testing.assert_allclose([temporal.density(), spatial.density()], expected, atol=2e-3)


def test_the_three_ways_to_count_widths():
    clip = Clip(0, 8, 30, 52)  # 1,560 tokens a frame
    even, paper, vendor = (half_widths(clip, B, way) for way in ("even", "paper", "vendor"))
    assert (even.temporal, even.spatial) == (int(B * 10920),) * 2 == (3198, 3198)
    assert (paper.temporal, paper.spatial) == (3198, int(B * 12480))
    # b is 0.29: 452.4 tokens of a frame are 3 blocks, 3,166.8 of all are 24
    assert (vendor.temporal, vendor.spatial) == (3 * 7 * 128, 24 * 128)


def test_the_step_of_the_checkerboard():
    found = [checkerboard_step(s) for s in (0, 0.5, 0.66, 2 / 3, 0.75, 0.8, 1)]
    assert found == [2, 2, 2, 3, 4, 5, 1000]


@pytest.mark.parametrize("rows", [7, 64, 10**6])
def test_recall_is_the_mass_inside(rows):
    q, k = planted_heads((3, 4, 4), size=16)
    q, k = (np.concatenate([x, x[:, ::-1]]) for x in (q, k))
    grid = TokenGrid.of((3, 4, 4), 48)
    kept = np.ones((2, 48), bool)
    kept[1, 30:] = False
    scores = (q @ k.swapaxes(2, 3)).astype(np.float64) / 4
    scores = np.where(kept[:, None, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True))[:, :, spread_rows(48, rows)]
    placed = np.random.default_rng(0).permutation(48)[None], np.zeros(4, np.int64)
    reach, widths = np.array([0, 3, 30, -1]), np.array([0, 1, 47, -1])
    masks = (
        *band_masks(grid, 4, B),
        BlockMask(*placed, leading=reach, first=5),
        BlockMask(*placed, band=widths),
        BlockMask(*placed, band=widths, first=7),
    )
    found = recall(q, k, masks, rows=rows, kept=kept)
    for mask, of_heads in zip(masks, found, strict=True):
        inside = (p * mask.pairs_of_tokens()[:, :, spread_rows(48, rows)]).sum(-1).mean((0, 2))
        np.testing.assert_allclose(of_heads, inside, atol=1e-5)


def test_rows_are_spread_and_meet_every_column():
    rows = spread_rows(4096, 64)
    assert len(rows) == 64
    assert np.diff(rows).max() < 3 * 64
    assert len(set(rows % 64)) > 32
    assert spread_rows(10, 64).tolist() == list(range(10))


def test_planted_heads_have_the_recalls_of_the_contract():
    """Printed there: spatial .559/1.000/.563, temporal .997/.686/.617, uniform .616/.660/.617 and
    .589/.635/.516 for the textural head, which depends on where its keys fall."""
    q, k = planted_heads((8, 8, 8))
    grid = TokenGrid.of((8, 8, 8), 512)
    masks = band_masks(grid, 4, B, counting="paper")
    table = recall(q, k, masks, rows=512).T
    np.testing.assert_allclose(table[0], [0.559, 1.000, 0.563], atol=4e-3)
    np.testing.assert_allclose(table[1], [0.997, 0.686, 0.617], atol=4e-3)
    np.testing.assert_allclose(table[3], [0.616, 0.660, 0.617], atol=4e-3)
    assert (table[2] < 0.75).all()
    kept = [float(mask.density()[0, 0]) for mask in masks]
    np.testing.assert_allclose(kept, [0.616, 0.660, 0.617], atol=2e-3)
    np.testing.assert_allclose(
        sampled_recall(q, k, grid.clips[0], 0.29).T[[0, 1, 3]],
        [[0.496, 1.0], [0.996, 0.996], [0.495, 0.495]],
        atol=4e-3,
    )


@pytest.mark.parametrize("text", [0, 13])
@pytest.mark.parametrize("shape", SHAPES)
def test_planted_heads_are_classified(shape, text):
    q, k = planted_heads(shape)
    q[:, 3], k[:, 3] = 0, 0  # uniform to the bit: a tie
    q, k = (np.pad(x, ((0, 0), (0, 0), (text, 0), (0, 0))) for x in (q, k))
    grid = TokenGrid.of(shape, q.shape[2], text)
    shipped = arm(q, k, grid, mode="arm2").classes
    assert shipped[:2] == ("spatial", "temporal")
    assert shipped[3] == ("spatial" if shape != (16, 5, 7) else shipped[3])
    assert arm(q, k, grid, mode="arm3").classes == ("spatial", "temporal", "textural", "textural")
    ours = arm(q, k, grid)
    assert ours.classes == ("spatial", "temporal", "dense", "dense")
    density = ours.mask.density()[0]
    assert (density[2:] == 1).all()
    assert (density[:2] < 0.75).all()


def test_ours_takes_the_best_mask_above_the_floor():
    """A head that meets only keys of the checkerboard is textural for us, too."""
    shape, size = (4, 8, 8), 16
    h, w = np.divmod(np.arange(64), 8)
    board = np.tile(h % 2 == w % 2, 4)
    q = np.zeros((1, 1, 256, size), np.float32)
    q[..., 0], k = 20, np.zeros_like(q)
    k[0, 0, board, 0] = 1
    grid = TokenGrid.of(shape, 256)
    found = arm(q, k, grid, rows=256)
    assert found.classes == ("textural",)
    assert found.recall[0, 2] > 0.98
    assert arm(q, k, grid, floor=0.999).classes == ("dense",)


def test_plus_takes_the_narrowest_band_that_is_enough():
    q, k = planted_heads((9, 8, 8))
    found = arm(q, k, TokenGrid.of((9, 8, 8), 576), mode="plus", floor=0.95)
    assert found.classes == ("spatial", "temporal", "dense", "dense")
    np.testing.assert_array_equal(found.bandwidth, [0.125, 0.125, np.nan, np.nan])
    wide = arm(q, k, TokenGrid.of((9, 8, 8), 576), mode="plus", alpha=0.9999, floor=0.95)
    np.testing.assert_array_equal(wide.bandwidth[:2], [0.5, 0.5])


def test_one_frame_is_dense():
    q = np.ones((1, 3, 64, 8), np.float32)
    for mode in ("best", "arm2", "arm3", "plus"):
        found = arm(q, q, TokenGrid.of((1, 8, 8), 64), mode=mode)
        assert found.classes == ("dense",) * 3
        assert found.mask.density().tolist() == [[1, 1, 1]]


def test_refusals():
    q, grid = np.zeros((1, 1, 64, 8), np.float32), TokenGrid.of((4, 4, 4), 64)
    spans = [{"start": 0, "latent_shape": (2, 4, 4)}, {"start": 32, "latent_shape": (2, 4, 4)}]
    with pytest.raises(MsQuantError, match="mode: 'arm4', expected one of best, arm2"):
        arm(q, q, grid, mode="arm4")
    with pytest.raises(MsQuantError, match="RainFusion 1: 2 clips, expected one"):
        arm(q, q, TokenGrid.of_spans(spans, 64))
    with pytest.raises(MsQuantError, match=r"sparsity: 1.5, expected the share"):
        arm(q, q, grid, sparsity=1.5)
    with pytest.raises(MsQuantError, match="rows: 0, expected at least one"):
        arm(q, q, grid, rows=0)
    with pytest.raises(MsQuantError, match="tau: 1, expected"):
        arm(q, q, grid, tau=1)
    with pytest.raises(MsQuantError, match="counting: 'odd', expected even or"):
        arm(q, q, grid, counting="odd")


def test_recall_of_blocks_is_the_mass_inside():
    """Counted by blocks, and beside a head with a band pair by pair."""
    q, k = planted_heads((3, 9, 11), size=16)
    grid = TokenGrid.of((3, 9, 11), 297)
    blocks = make_mask(SparseRule("rf_v3", 0.9, (32, 64)), q, k, grid)
    mixed = pick([blocks, band_masks(grid, 4, 0.1)[0]], np.array([0, 1, 0, 1]))
    scores = (q @ k.swapaxes(2, 3)).astype(np.float64) / 4
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    found = recall(q, k, [blocks, mixed], rows=297)
    for mask, of_heads in zip((blocks, mixed), found, strict=True):
        inside = (p * mask.pairs_of_tokens()).sum(-1).mean((0, 2))
        np.testing.assert_allclose(of_heads, inside, atol=1e-5)
    assert (found[0] < 0.999).any()


def test_the_shipped_and_the_papers_rule_on_recalls():
    """Columns: temporal 0, spatial 1, textural 2."""
    table = np.array([[0.7, 0.6], [0.6, 0.7], [0.5, 0.5], [0.96, 0.99], [0.94, 0.99], [0.92, 0.91]])
    assert module._shipped(table).tolist() == [0, 1, 1, 0, 1, 0]
    assert module._paper(table, 0.9).tolist() == [2, 2, 2, 0, 0, 0]
    assert module._paper(table, 0.95).tolist() == [2, 2, 2, 0, 1, 2]
