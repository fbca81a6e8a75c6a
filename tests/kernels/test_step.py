"""Products and attention of a step: exact within their bound, and each row as if it were alone."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant import kernels
from ms_quant.kernels import native

ISAS = [None, *(isa for isa in native.ISAS if native.available() and native.has_isa(isa))]
EPSILON = 2.0**-24


def random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@given(
    rows=st.integers(0, 11),
    outputs=st.sampled_from([1, 2, 85, 86, 300]),
    inputs=st.sampled_from([1, 7, 15, 16, 63, 64, 65, 384, 5000]),
    narrow=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_row_products(isa, rows, outputs, inputs, narrow, biased, seed):
    x, weight = random((rows, inputs), seed), random((outputs, inputs), seed + 1)
    if narrow and native.available():
        weight = weight.astype(ml_dtypes.bfloat16)
    bias = random((outputs,), seed + 2) if biased else None
    found = kernels.row_products(x, weight, bias, threads=2, isa=isa)
    wide = weight.astype(np.float64)
    exact = x @ wide.T + (0 if bias is None else bias)
    size = np.abs(x).astype(np.float64) @ np.abs(wide).T + (0 if bias is None else np.abs(bias))
    assert (np.abs(found - exact) <= (inputs + 8) * EPSILON * size).all()
    for row, out in zip(x, found, strict=True):
        alone = kernels.row_products(row[None], weight, bias, threads=1, isa=isa)
        np.testing.assert_array_equal(alone[0], out)


@pytest.mark.parametrize("isa", ISAS)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    size=st.sampled_from([1, 8, 20, 64, 80]),
    made=st.sampled_from([1, 8, 20, 64, 200]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_step_attention(isa, lengths, kv_heads, group, size, made, seed):
    q = random((len(lengths), kv_heads * group, size), seed)
    rooms = [random((kv_heads, n + n % 5, size + made), seed + i) for i, n in enumerate(lengths)]
    keys = [np.ascontiguousarray(r[..., :size])[:, :n] for r, n in zip(rooms, lengths, strict=True)]
    values = [r[:, :n, size:] for r, n in zip(rooms, lengths, strict=True)]  # rows lie apart
    found = kernels.step_attention(q, keys, values, 0.3, threads=2, isa=isa)
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        wide = np.repeat(key, group, axis=0).astype(np.float64)
        scores = 0.3 * np.einsum("hd,htd->ht", q[i], wide)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        exact = np.einsum("ht,hte->he", weights, np.repeat(value, group, axis=0))
        np.testing.assert_allclose(found[i], exact, rtol=0, atol=2e-5)
        alone = kernels.step_attention(q[i : i + 1], [key], [value], 0.3, threads=1, isa=isa)
        np.testing.assert_array_equal(alone[0], found[i])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_odd_numbers_stay_in_their_row(isa, value):
    x, weight = random((5, 65), 0), random((9, 65), 1)
    x[2, 64] = value
    found = kernels.row_products(x, weight, isa=isa)
    assert not np.isfinite(found[2]).any() and np.isfinite(found[[0, 1, 3, 4]]).all()
    q, keys = random((2, 2, 16), 0), [random((2, 5, 16), seed) for seed in range(2)]
    keys[1][0, 3, 3] = np.nan
    with np.errstate(all="ignore"):
        found = kernels.step_attention(q, keys, keys, 1.0, isa=isa)
    assert np.isfinite(found[0]).all() and np.isnan(found[1, 0]).all()
