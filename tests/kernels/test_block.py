"""What lies between linears against float64: in NumPy, and on every instruction set here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant import kernels
from ms_quant.errors import MsQuantError
from ms_quant.kernels import native
from ms_quant.numerics import layers

ISAS = ["numpy", *(name for name in native.ISAS if kernels.available() and kernels.has_isa(name))]
SIZES = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 64, 100, 129])
ROWS = st.sampled_from([0, 1, 2, 7, 130])
EPSILON = 2.0**-24


def random(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> np.ndarray:
    return (spread * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def run(isa: str, name: str, *arguments):
    """A function of the reference, or of the kernels."""
    if isa == "numpy":
        return getattr(layers, name)(*arguments)
    return getattr(kernels, name)(*arguments, threads=2, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@given(rows=ROWS, size=SIZES, spread=st.sampled_from([1e-6, 1.0, 1e6]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_rms_norm(isa: str, rows: int, size: int, spread: float, seed: int) -> None:
    x, weight = random((rows, size), seed, spread), random((size,), seed + 1)
    found = run(isa, "rms_norm", x, weight, 1e-6)
    wide = x.astype(np.float64)
    mean = np.square(wide).mean(axis=1, keepdims=True) + 1e-6
    expected = wide / np.sqrt(mean) * weight
    assert (np.abs(found - expected) <= (size + 8) * EPSILON * np.abs(expected) + 1e-37).all()


@pytest.mark.parametrize("isa", ISAS)
@given(count=st.sampled_from([0, 1, 15, 16, 17, 16384, 20001]), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_swiglu(isa: str, count: int, seed: int) -> None:
    gate, up = random((count,), seed, 30), random((count,), seed + 1)
    found = run(isa, "swiglu", gate, up)
    wide = gate.astype(np.float64)
    expected = wide / (1 + np.exp(-wide)) * up
    assert (np.abs(found - expected) <= 8 * EPSILON * np.abs(expected) + 1e-32).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gate", [-3e38, -1e3, -89.0, -80.5, 0.0, 80.5, 89.0, 1e3, 3e38])
def test_swiglu_of_extremes(isa: str, gate: float) -> None:
    found = run(isa, "swiglu", np.float32([gate]), np.float32([1]))[0]
    expected = gate / (1 + np.exp(min(700.0, -gate)))
    assert abs(found - expected) <= 1e-6 * abs(expected) + 1e-32


@pytest.mark.parametrize("isa", ISAS)
@given(
    batch=st.integers(0, 3),
    length=st.integers(0, 5),
    heads=st.integers(1, 4),
    half=st.sampled_from([1, 3, 8, 16, 33]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_rope(isa: str, batch: int, length: int, heads: int, half: int, seed: int) -> None:
    x = random((batch, length, heads, 2 * half), seed)
    cos, sin = random((length, 2 * half), seed + 1), random((length, 2 * half), seed + 2)
    found = run(isa, "rope", x, cos, sin)
    turned = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    expected = x * cos[:, None] + turned * sin[:, None]
    np.testing.assert_array_equal(found, expected.transpose(0, 2, 1, 3))


@pytest.mark.parametrize("isa", ISAS)
@given(
    masks=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 5),
    columns=SIZES,
    spread=st.sampled_from([0.1, 3.0, 100.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_softmax(
    isa: str, masks: int, heads: int, length: int, columns: int, spread: float, seed: int
) -> None:
    scores = random((masks * heads * length, columns), seed, spread)
    visible = np.random.default_rng(seed).random((masks, length, columns)) < 0.7
    visible[..., 0] = True
    mask = np.where(visible, 0, np.float32(-1e30)).astype(np.float32)
    wide = 0.3 * scores.astype(np.float64).reshape(masks, heads, length, columns) + mask[:, None]
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    expected = (powers / powers.sum(axis=-1, keepdims=True)).reshape(scores.shape)
    run(isa, "masked_softmax", scores, mask, 0.3)
    bound = (columns + 8 + 4 * 100 * 0.3 * 4) * EPSILON * expected + 1e-34
    assert (np.abs(scores - expected) <= bound).all()
    assert (scores.reshape(wide.shape)[np.broadcast_to(~visible[:, None], wide.shape)] == 0).all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_without_visible_keys_is_finite(isa: str) -> None:
    scores = random((2, 20), 0)
    run(isa, "masked_softmax", scores, np.full((1, 2, 20), -1e30, np.float32), 1.0)
    np.testing.assert_allclose(scores, 1 / 20, rtol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("column", [0, 17, 36])
def test_nan_stays(isa: str, column: int) -> None:
    x = random((3, 37), 0)
    x[1, column] = np.nan
    weight = np.ones(37, np.float32)
    found = [run(isa, "rms_norm", x, weight, 1e-6), run(isa, "swiglu", x, x), x.copy()]
    run(isa, "masked_softmax", found[2], np.zeros((1, 3, 37), np.float32), 1.0)
    for y in found:
        assert np.isnan(y[1]).any() and np.isfinite(y[[0, 2]]).all()
    assert np.isnan(found[0][1]).all() and np.isnan(found[2][1]).all()


@pytest.mark.parametrize("isa", ISAS[1:])
@given(
    batch=st.integers(0, 2),
    kv_heads=st.integers(1, 2),
    share=st.integers(1, 3),
    length=st.sampled_from([0, 1, 5, 12, 13, 48, 49, 100]),
    more=st.sampled_from([0, 1, 30]),
    size=st.sampled_from([1, 8, 30, 32, 64, 72]),
    hidden=st.sampled_from(["nothing", "later", "later and padding", "all of some"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_attention(isa, batch, kv_heads, share, length, more, size, hidden, seed) -> None:
    total = max(1, length + more)
    q = random((batch, kv_heads * share, length, size), seed)
    k, v = (random((batch, kv_heads, total, size), seed + i) for i in (1, 2))
    masks = batch if hidden == "later and padding" and batch else 1
    visible = np.ones((masks, length, total), bool)
    if hidden.startswith("later"):
        visible = np.tril(visible, more)
    if hidden.endswith("padding"):
        visible[-1, :, : total // 3] = False
    if hidden == "all of some":
        visible[:, ::3] = False
    mask = np.where(visible, random((masks, length, total), seed + 3), np.float32(-1e30))
    scale = size**-0.5
    found = kernels.attention(q, k, v, mask, scale, threads=2, isa=isa)
    wide = np.repeat(k.astype(np.float64), share, axis=1)
    scores = q.astype(np.float64) @ wide.transpose(0, 1, 3, 2) * scale + mask[:, None]
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = powers / powers.sum(axis=-1, keepdims=True)
    values = np.repeat(v.astype(np.float64), share, axis=1)
    expected = (weights @ values).transpose(0, 2, 1, 3)
    bound = 4e-6 * (weights @ np.abs(values)).transpose(0, 2, 1, 3) + 1e-30
    # Where a query sees nothing, its scores are lost beside -1e30 in float32 alone.
    lost = np.broadcast_to(~visible.any(axis=-1)[:, :, None, None], expected.shape)
    mean = np.broadcast_to(values.mean(axis=2)[:, None], expected.shape)
    expected, bound = np.where(lost, mean, expected), np.where(lost, 1e-5, bound)
    assert (np.abs(found - expected) <= bound).all()


@pytest.mark.parametrize("isa", ISAS[1:])
def test_attention_by_several_threads_is_the_same(isa: str) -> None:
    q, k, v = (random((2, heads, 100, 24), heads) for heads in (6, 2, 2))
    mask = np.where(np.tri(100, dtype=bool), 0, np.float32(-1e30))[None].astype(np.float32)
    one = kernels.attention(q, k, v, mask, 0.2, threads=1, isa=isa)
    np.testing.assert_array_equal(kernels.attention(q, k, v, mask, 0.2, threads=3, isa=isa), one)


@pytest.mark.skipif(not kernels.available(), reason="no C++ compiler at install time")
def test_attention_refuses_heads_that_share_no_whole_keys() -> None:
    q, k = random((1, 3, 4, 8), 0), random((1, 2, 4, 8), 1)
    with pytest.raises(MsQuantError, match="an argument is wrong"):
        kernels.attention(q, k, k, np.zeros((1, 4, 4), np.float32), 1.0)
