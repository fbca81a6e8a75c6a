"""From a rule to outputs: every rule against a dense masked oracle, odd grids, padding, steps."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_attention import planted_heads

from ms_quant import kernels
from ms_quant.attention.arm import MODES
from ms_quant.attention.dense import attention
from ms_quant.attention.fa_quant import KINDS as KINDS_OF_OPERANDS
from ms_quant.attention.fa_quant import decoded, quantize_operands
from ms_quant.attention.grid import TokenGrid
from ms_quant.attention.mask import BlockMask, dense_mask, pick
from ms_quant.attention.orders import inverse
from ms_quant.attention.rotation import walsh_rotation
from ms_quant.attention.rules import KINDS, SparseRule, make_mask
from ms_quant.attention.schedule import MaskCache, StepWindow
from ms_quant.attention.sparse import attend
from ms_quant.errors import MsQuantError

RULES = [SparseRule(kind, 0.7) for kind in KINDS]
RULES += [SparseRule("rf_v1", 0.7, mode=mode) for mode in ("arm2", "arm3", "plus")]
RULES += [SparseRule("rf_v3", 0.7, (128, 256), protect_first_frame=False)]
GRIDS = [
    ((1, 1, 1), 0),
    ((1, 1, 1), 2),
    ((5, 9, 11), 0),
    ((5, 9, 11), 20),
    ((4, 8, 16), 150),
    ((2, 3, 3), 300),
]


def video(shape, text, batch=1, seed=0):
    """Planted heads of a video with random text before it."""
    rng = np.random.default_rng(seed)
    q, k = planted_heads(shape, size=32, seed=seed)
    before = rng.standard_normal((2, batch, 4, text, 32), np.float32)
    video = np.repeat([q, k], batch, axis=1)
    q, k = np.concatenate([before, video], axis=3)
    q[1:] += rng.standard_normal(q[1:].shape, np.float32)
    return q, k, rng.standard_normal(q.shape, np.float32)


def label(rule):
    return f"{rule.kind}-{rule.mode}-{rule.block_shape[1]}"


@pytest.mark.parametrize("rule", RULES, ids=label)
@pytest.mark.parametrize(("shape", "text"), GRIDS)
def test_outputs_are_dense_attention_under_the_mask(rule, shape, text):
    q, k, v = video(shape, text, batch=2)
    tokens = q.shape[2]
    grid = TokenGrid.of(shape, tokens, text)
    kept = np.ones((2, tokens), bool)
    kept[1, : text // 2] = False
    mask = make_mask(rule, q, k, grid, kept=kept)
    pairs = mask.pairs_of_tokens()
    out = attend(q, k, v, mask, kept=kept)
    np.testing.assert_allclose(out, attention(q, k, v, mask=pairs, kept=kept), rtol=0, atol=1e-5)
    np.testing.assert_allclose(mask.density(), pairs.mean(axis=(2, 3)), rtol=1e-12)
    assert pairs[:, :, :text].all()  # text asks all and is asked by all
    assert pairs[:, :, :, :text].all()
    if rule.protect_first_frame and rule.kind != "ada_bsa":
        frame = slice(text, text + shape[1] * shape[2])
        assert pairs[:, :, frame].all()
        assert pairs[:, :, :, frame].all()
    assert pairs.any(axis=3).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_text_and_block(data):
    shape = tuple(data.draw(st.integers(1, most)) for most in (5, 12, 12))
    text, first = data.draw(st.integers(0, 40)), data.draw(st.booleans())
    kind = data.draw(st.sampled_from(KINDS))
    block_shape = data.draw(st.sampled_from([(16, 16), (16, 32), (5, 7)]))
    rule = SparseRule(
        kind,
        data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        block_shape if kind != "ada_bsa" else (128, 128),
        mode=data.draw(st.sampled_from(MODES)),
    )
    tokens = math.prod(shape) + text
    rng = np.random.default_rng(tokens)
    q, k, v = 2 * rng.standard_normal((3, 1, 2, tokens, 4), np.float32)
    kept = rng.random((1, tokens)) < 0.9
    mask = make_mask(rule, q, k, TokenGrid.of(shape, tokens, text, first), kept=kept)
    assert (np.sort(mask.orders) == np.arange(tokens)).all()
    pairs = mask.pairs_of_tokens()
    beside = slice(0, text) if first else slice(tokens - text, tokens)
    assert pairs[:, :, beside].all()
    assert pairs[:, :, :, beside].all()
    assert pairs.any(axis=3).all()
    np.testing.assert_allclose(
        attend(q, k, v, mask, kept=kept), attention(q, k, v, mask=pairs, kept=kept), atol=1e-5
    )
    np.testing.assert_allclose(mask.density(), pairs.mean(axis=(2, 3)), rtol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=label)
def test_rules_leave_something_out(rule):
    q, k, _ = video((12, 16, 16), 40)
    density = make_mask(rule, q, k, TokenGrid.of((12, 16, 16), 3112, 40)).density()
    assert density.min() < 0.75


def test_no_sparsity_is_dense_attention():
    q, k, v = video((4, 8, 16), 30)
    grid = TokenGrid.of((4, 8, 16), 542, 30)
    for kind in ("rf_v2", "rf_v3", "time_blocks"):
        mask = make_mask(SparseRule(kind, 0.0), q, k, grid)
        np.testing.assert_allclose(attend(q, k, v, mask), attention(q, k, v), atol=1e-5)


def test_half_precision_is_computed_in_float32():
    q, k, v = (x.astype(np.float16) for x in video((4, 8, 16), 30))
    wide = [x.astype(np.float32) for x in (q, k, v)]
    grid = TokenGrid.of((4, 8, 16), 542, 30)
    for rule in RULES[:5]:
        mask = make_mask(rule, q, k, grid)
        expected = attend(*wide, make_mask(rule, *wide[:2], grid))
        np.testing.assert_array_equal(attend(q, k, v, mask), expected)


def test_text_may_come_last():
    q, k, _ = video((5, 9, 11), 20)
    turned = [np.concatenate([x[:, :, 20:], x[:, :, :20]], axis=2) for x in (q, k)]
    for rule in RULES:
        if rule.kind == "ada_bsa":  # takes tokens as they come
            continue
        before = make_mask(rule, q, k, TokenGrid.of((5, 9, 11), 515, 20)).density()
        after = make_mask(rule, *turned, TokenGrid.of((5, 9, 11), 515, 20, False)).density()
        np.testing.assert_allclose(before, after, rtol=0, atol=1e-3)


def test_a_batch_shares_its_blocks_in_rf_v2_alone():
    q, k, _ = video((12, 16, 16), 0, batch=2)
    grid = TokenGrid.of((12, 16, 16), 3072)
    shared, own = (make_mask(SparseRule(kind, 0.7), q, k, grid) for kind in ("rf_v2", "rf_v3"))
    assert (shared.batch, own.batch) == (1, 2)
    np.testing.assert_array_equal(shared.blocks[0], own.blocks[0])
    assert (own.blocks[0] != own.blocks[1]).any()


def test_temporal_heads_get_blocks_along_time():
    """They hold what windows of a frame cannot: measured as error of the output."""
    q, k, v = video((8, 16, 16), 0)
    grid = TokenGrid.of((8, 16, 16), 2048)
    reference, errors = attention(q, k, v), {}
    for kind in ("rf_v3", "time_blocks"):
        mask = make_mask(SparseRule(kind, 0.75), q, k, grid)
        errors[kind] = np.square(attend(q, k, v, mask) - reference).sum(axis=(0, 2, 3))
    assert mask.names[:2] == ("windows", "time")
    np.testing.assert_allclose(errors["time_blocks"][0], errors["rf_v3"][0], rtol=1e-6)
    assert errors["time_blocks"][1] < errors["rf_v3"][1] / 2


def test_several_clips_each_protect_their_first_frame():
    spans = [{"start": 10, "latent_shape": (3, 8, 16)}, {"start": 400, "latent_shape": (4, 9, 10)}]
    tokens = 900
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, tokens, 16), np.float32)
    grid = TokenGrid.of_spans(spans, tokens)
    mask = make_mask(SparseRule("rf_v3", 0.9), q, k, grid)
    pairs = mask.pairs_of_tokens()
    np.testing.assert_allclose(attend(q, k, v, mask), attention(q, k, v, mask=pairs), atol=1e-5)
    for whole in (slice(0, 10), slice(394, 400), slice(760, 900), slice(10, 138), slice(400, 490)):
        assert pairs[0, :, whole].all()
        assert pairs[0, :, :, whole].all()
    assert not pairs.all()


def test_masks_of_32768_tokens_stay_small():
    """Takes seconds: only a sequence as long as a real clip's shows what grows with its square."""
    shape, tokens = (32, 32, 32), 32768
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 2, tokens, 16), np.float32)
    grid = TokenGrid.of(shape, tokens)
    tracemalloc.start()
    for kind in KINDS:
        mask = make_mask(SparseRule(kind, 0.8), q, k, grid)
        assert mask.density().shape == (1, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < tokens * tokens / 8  # a bit for each pair would be 134 MB


def test_pick_mixes_heads():
    q, k, v = video((5, 9, 11), 20)
    grid = TokenGrid.of((5, 9, 11), 515, 20)
    masks = [make_mask(rule, q, k, grid) for rule in RULES[:4]] + [dense_mask(515, 4)]
    every = [mask.pairs_of_tokens()[0] for mask in masks]
    for choice in ([0, 1, 2, 3], [4, 4, 0, 0], [3, 4, 1, 1], [4, 4, 4, 4]):
        mixed = pick(masks, np.array(choice))
        expected = np.stack([every[i][head] for head, i in enumerate(choice)])
        np.testing.assert_array_equal(mixed.pairs_of_tokens()[0], expected)
        np.testing.assert_allclose(
            attend(q, k, v, mixed), attention(q, k, v, mask=expected[None]), rtol=0, atol=1e-5
        )


def test_heads_of_one_order_are_computed_together():
    """Without text a spatial band has tokens as they come, and so have dense heads."""
    q, k, _ = video((8, 8, 8), 0)
    mask = make_mask(SparseRule("rf_v1"), q, k, TokenGrid.of((8, 8, 8), 512))
    assert mask.names == ("spatial", "temporal", "dense", "dense")
    assert mask.order_of.tolist() == [0, 1, 0, 0]
    assert mask.orders[0].tolist() == list(range(512))


def test_the_kernel_gets_all_at_once():
    """Nothing is copied in order: it gets the arrays that there are, and the order of each head."""
    q, k, v = video((5, 9, 11), 20)
    mask = make_mask(SparseRule("time_blocks", 0.7), q, k, TokenGrid.of((5, 9, 11), 515, 20))

    def kernel(*arrays, order, blocks, **options):
        assert all(x is y for x, y in zip(arrays, (q, k, v), strict=True))
        np.testing.assert_array_equal(order, mask.orders[mask.order_of])
        assert len(mask.orders) == 2
        assert blocks.flags.c_contiguous and blocks.shape[1] == 4
        nothing = {"band": None, "first": 0, "leading": None, "kept": None}
        assert options == {"scale": 0.5, "block_shape": (128, 128), **nothing}
        return v

    assert attend(q, k, v, mask, scale=0.5, kernel=kernel) is v
    whole = dense_mask(515, 4)
    assert attend(q, k, v, whole, kernel=lambda *_, order, **__: order) is None


@pytest.mark.parametrize("rule", RULES[:6], ids=label)
def test_heads_may_lie_inside(rule):
    """As (batch, tokens, heads, size) has them: the same bits, and the result lies so, too."""
    q, k, v = video((5, 9, 11), 20, batch=2)
    grid = TokenGrid.of((5, 9, 11), 515, 20)
    inside = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v)]
    found = attend(*inside, make_mask(rule, *inside[:2], grid))
    np.testing.assert_array_equal(found, attend(q, k, v, make_mask(rule, q, k, grid)))
    if kernels.available():
        assert found.swapaxes(1, 2).flags.c_contiguous


@pytest.mark.parametrize("rule", RULES[:6], ids=label)
def test_sparse_attention_over_quantized_operands(rule):
    """Quantized in the order of each head: rows of 128 and 256 places share a scale."""
    q, k, v = video((5, 9, 11), 20)
    grid = TokenGrid.of((5, 9, 11), 515, 20)
    mask, rotation = make_mask(rule, q, k, grid), walsh_rotation(32)
    scales = tuple(np.abs(x).max(axis=(0, 2, 3)) / 127 for x in (q, k, v))
    for kind in KINDS_OF_OPERANDS:
        options = {"kind": kind, "scales": scales if kind == "INT8" else None}
        rotations = (rotation, rotation) if kind in ("MIX", "FP8_DYNAMIC") else (None, None)
        out = attend(q, k, v, mask, prepare=decoded(kind, *rotations, scales=options["scales"]))
        for head in range(4):
            order = mask.orders[mask.order_of[head]]
            taken = (x[:, head : head + 1, order] for x in (q, k, v))
            if kind == "INT8":
                options["scales"] = tuple(scale[head : head + 1] for scale in scales)
            made = quantize_operands(*taken, *rotations, **options)
            values = (part.values()[:, :, inverse(order)] for part in (made.q, made.k, made.v))
            pairs = mask.pairs_of_tokens()[:, head : head + 1]
            expected = attention(*values, mask=pairs)
            np.testing.assert_allclose(out[:, head : head + 1], expected, rtol=0, atol=2e-5)


def test_the_window_of_sparse_steps():
    window = StepWindow(2, 5)
    assert [step in window for step in range(7)] == [False, False, True, True, True, False, False]
    assert 10**6 in StepWindow(2)


@pytest.mark.parametrize(
    ("refresh", "made"), [(0, [2, 2, 2, 2, 2]), (1, [2, 3, 4, 5, 6]), (2, [2, 2, 4, 4, 6])]
)
def test_masks_are_refreshed(refresh, made):
    cache = MaskCache(StepWindow(2, 7, refresh))
    found = [cache.at(step, lambda step=step: step) for step in range(9)]
    assert found == [None, None, *made, None, None]


def test_a_new_loop_and_a_new_grid_have_new_masks():
    calls = []
    cache = MaskCache(StepWindow())
    for step, key in ((0, "a"), (0, "a"), (1, "a"), (0, "a"), (1, "b"), (2, "b")):
        cache.at(step, lambda step=step: calls.append(step) or len(calls), key)
    assert calls == [0, 0, 1]


Q = np.zeros((1, 2, 64, 8), np.float32)
GRID = TokenGrid.of((4, 4, 4), 64)
ONES = np.ones((1, 2, 1, 1), np.uint8)
ORDER = np.arange(64)[None], np.zeros(2, np.int64)
REFUSED = [
    (lambda: SparseRule("rf_v4"), "kind: 'rf_v4', expected one of rf_v1, rf_v2"),
    (lambda: SparseRule("rf_v2", 2), "sparsity: 2, expected"),
    (lambda: SparseRule("rf_v2", protect_first_frame=False), "expected rf_v3 or time_blocks"),
    (lambda: SparseRule("ada_bsa", block_shape=(64, 64)), r"block_shape: \(64, 64\) with ada_bsa"),
    (lambda: make_mask(SparseRule("rf_v3"), Q[:, :, :60], Q, GRID), "60 queries and 64 keys"),
    (lambda: attend(Q, Q, Q / 0, dense_mask(64, 2)), "v: 1024 of 1024 values are NaN or inf"),
    (lambda: make_mask(SparseRule("rf_v3"), Q, Q / 0, GRID), "k: 1024 of 1024 values are NaN"),
    (lambda: attend(Q, Q, Q, dense_mask(63, 2)), "mask: of 2 heads and 63 tokens, expected 2"),
    (lambda: attend(Q, Q, Q, BlockMask(*ORDER, np.tile(ONES, (3, 1, 1, 1)))), "a batch of 3"),
    (lambda: BlockMask(*ORDER, ONES[:, :1]), "blocks: uint8 of shape"),
    (lambda: BlockMask(*ORDER, ONES * 0, leading=np.array([3, -1])), "leading: with blocks"),
    (lambda: BlockMask(*ORDER, names=("a",)), "names: 1, expected"),
    (lambda: pick([dense_mask(3, 2), dense_mask(4, 2)], np.zeros(2, int)), "of several lengths"),
    (lambda: StepWindow(-1), "start: -1, expected 0 or more"),
    (lambda: StepWindow(5, 3), r"end: 3, expected 5 \(start\) or more"),
    (lambda: MaskCache().at(None, dict), "step: none is set, expected the index"),
]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call, message):
    with pytest.raises(MsQuantError, match=message):
        call()
