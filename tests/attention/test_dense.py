"""Dense attention and block attention against loops; layouts; what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_attention import everything, slow_attention

from ms_quant.attention import block_attention as module
from ms_quant.attention.block_attention import block_attention
from ms_quant.attention.dense import attention
from ms_quant.attention.layouts import from_heads_first, heads_first, operands
from ms_quant.errors import MsQuantError

# float32 sums of some hundred terms below 4 in magnitude
CLOSE = {"rtol": 0, "atol": 5e-6}


def random_qkv(rng, batch, heads, length, keys, size):
    q = rng.standard_normal((batch, heads, length, size), np.float32)
    k, v = rng.standard_normal((2, batch, heads, keys, size), np.float32)
    return q, k, v


def test_one_score_by_hand():
    """Scores 0 and ln 3: weights 1/4 and 3/4."""
    q, k = np.ones((1, 1, 1, 1), np.float32), np.array([0, np.log(3)], np.float32)
    v = np.array([4, 8], np.float32)
    out = attention(q, k.reshape(1, 1, 2, 1), v.reshape(1, 1, 2, 1), scale=1)
    np.testing.assert_allclose(out.ravel(), [7], rtol=1e-6)


@pytest.mark.parametrize(("length", "keys"), [(1, 1), (5, 9), (9, 5)])
def test_dense_is_the_loop(length, keys):
    rng = np.random.default_rng(length)
    q, k, v = random_qkv(rng, 2, 3, length, keys, 4)
    mask, kept = rng.random((3, length, keys)) < 0.6, rng.random((2, keys)) < 0.7
    mask[1, 0] = False
    out = attention(q, k, v, mask=mask, kept=kept)
    slow = slow_attention(q, k, v, lambda b, h, i, j: mask[h, i, j] and kept[b, j])
    np.testing.assert_allclose(out, slow, **CLOSE)
    np.testing.assert_allclose(
        attention(q, k, v, scale=0.3), slow_attention(q, k, v, everything, 0.3), **CLOSE
    )


def test_a_row_without_keys_gives_zeros():
    q, k, v = random_qkv(np.random.default_rng(0), 2, 1, 3, 4, 8)
    kept = np.ones((2, 4), bool)
    kept[1] = False
    for out in (attention(q, k, v, kept=kept), block_attention(q, k, v, kept=kept)):
        assert not out[1].any()
        assert out[0].any(axis=-1).all()


def test_few_rows_at_a_time_are_the_same(monkeypatch):
    q, k, v = random_qkv(np.random.default_rng(0), 1, 2, 37, 41, 8)
    whole = attention(q, k, v)
    monkeypatch.setattr("ms_quant.attention.dense.SCORES_AT_ONCE", 41 * 5)
    np.testing.assert_allclose(attention(q, k, v), whole, rtol=0, atol=1e-6)


def test_large_scores_do_not_overflow():
    q, k, v = random_qkv(np.random.default_rng(0), 1, 1, 3, 4, 8)
    out = attention(q * 1000, k * 1000, v)
    best = np.argmax(q[0, 0] @ k[0, 0].T, axis=1)
    np.testing.assert_allclose(out[0, 0], v[0, 0, best], rtol=1e-5)


def test_probabilities_in_e4m3():
    """0.3 and 1 become 0.3125 and 1; the sum stays 1.3."""
    q = np.ones((1, 1, 1, 1), np.float32)
    k = np.log(np.array([0.3, 1], np.float32)).reshape(1, 1, 2, 1)
    v = np.array([1, 0], np.float32).reshape(1, 1, 2, 1)
    assert float(np.float32(0.3).astype(ml_dtypes.float8_e4m3fn)) == 0.3125
    out = attention(q, k, v, scale=1, p_e4m3=True)
    np.testing.assert_allclose(out.ravel(), [0.3125 / 1.3], rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_block_attention_is_the_loop(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    batch, heads, length = 2, 2, data.draw(st.integers(1, 14))
    rows, columns = data.draw(st.sampled_from([(1, 1), (4, 4), (4, 8), (3, 5), (64, 64)]))
    q, k, v = random_qkv(rng, batch, heads, length, length, 4)
    counts = -(-length // rows), -(-length // columns)
    share = data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    blocks = (rng.random((data.draw(st.sampled_from([1, 2])), heads, *counts)) < share) * 1
    blocks = None if data.draw(st.booleans()) else blocks.astype(np.uint8)
    band = np.array(data.draw(st.sampled_from([[-1, 2], [0, 5], [3, 100]])), np.int64)
    band = None if data.draw(st.booleans()) else band
    first = data.draw(st.integers(0, length))
    kept = None if data.draw(st.booleans()) else rng.random((batch, length)) < 0.7

    def keeps(b, h, i, j):
        in_block = blocks is None or blocks[b % len(blocks), h, i // rows, j // columns]
        near = band is None or band[h] < 0 or abs(i - j) <= band[h] or min(i, j) < first
        return in_block and near and (kept is None or kept[b, j])

    out = block_attention(
        *(q, k, v), blocks=blocks, block_shape=(rows, columns), band=band, first=first, kept=kept
    )
    np.testing.assert_allclose(out, slow_attention(q, k, v, keeps), **CLOSE)


def test_block_attention_touches_only_what_it_keeps(monkeypatch):
    """32,768 tokens, a band of 64 and two blocks of 256 a row: never more than 600 keys."""
    most = []
    real = module.scaled_scores
    monkeypatch.setattr(
        module, "scaled_scores", lambda q, k, scale: most.append(len(k)) or real(q, k, scale)
    )
    tokens = 32768
    q, k, v = random_qkv(np.random.default_rng(0), 1, 2, tokens, tokens, 8)
    blocks = np.zeros((1, 2, 256, 256), np.uint8)
    blocks[0, 0, np.arange(256), np.arange(256)[::-1]] = 1
    blocks[0, 0, :, 3] = 1
    blocks[0, 1] = 1
    block_attention(q, k, v, blocks=blocks, band=np.array([-1, 64]), first=200)
    assert sum(count > 600 for count in most) == 2  # the blocks of the first 200 queries
    assert len(most) == 512


def test_layouts_go_there_and_back():
    x = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    assert heads_first(x, "BSND").shape == (2, 4, 3, 5)
    for layout in ("BNSD", "BSND"):
        np.testing.assert_array_equal(from_heads_first(heads_first(x, layout), layout), x)


Q = np.zeros((1, 2, 3, 4), np.float32)
REFUSED = [
    (lambda: operands(Q, Q, Q, "SBH"), "layout: 'SBH', expected one of BNSD, BSND"),
    (lambda: operands(Q, Q[0], Q), r"k: shape \(2, 3, 4\), expected four axes in BNSD"),
    (lambda: operands(Q, Q, Q[..., :3]), r"v: \(batch.*\) of \(1, 2, 3, 3\), expected \(1, 2, 3"),
    (lambda: operands(Q, Q + np.nan, Q), "k: 24 of 24 values are NaN or inf"),
    (lambda: operands(Q[:, :, :0], Q, Q), "q: shape .*none of them 0"),
    (lambda: attention(Q, Q, Q, scale=np.inf), "scale: inf, expected a finite number"),
    (lambda: attention(Q, Q, Q, kept=np.ones((1, 2), bool)), r"kept: bool of shape \(1, 2\)"),
    (lambda: attention(Q, Q, Q, mask=np.ones((1, 5), bool)), r"mask: bool of shape \(1, 5\)"),
    (lambda: attention(Q, Q, Q, mask=np.ones((3, 3))), "mask: float64 of shape .*expected bool"),
    (lambda: attention(Q + 1e30, Q + 1e30, Q), "overflows float32, expected finite scores"),
    (lambda: block_attention(Q, Q, Q, blocks=np.ones((1, 2, 2, 1), np.uint8)), "blocks: uint8 of"),
    (lambda: block_attention(Q, Q, Q, blocks=np.ones((3, 2, 1, 1), np.uint8)), "a batch of 3"),
    (lambda: block_attention(Q, Q, Q, band=np.zeros(3, int)), r"band: int64 of shape \(3,\)"),
    (lambda: block_attention(Q, Q, Q, block_shape=(0, 1)), r"block_shape: \(0, 1\)"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call, message):
    with pytest.raises(MsQuantError, match=message):
        call()
