"""The int8 KV cache: golden values, the bound of half a step, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ms_quant.errors import MsQuantError
from ms_quant.numerics import affine, groupwise, kv_cache

HALF_STEP = 0.5 + 2.0**-14  # see test_affine.py
CACHES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(0, 3), st.integers(1, 2), st.integers(1, 5)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@pytest.mark.parametrize("symmetric", [True, False])
@settings(max_examples=30, deadline=None)
@given(x=CACHES)
def test_channels(symmetric, x):
    flat = x.reshape(-1, x.shape[-1])
    low, high = flat.min(axis=0, initial=0), flat.max(axis=0, initial=0)
    scale, offset = kv_cache.channel_parameters(low, high, "k", symmetric=symmetric)
    codes = kv_cache.quantize_channels(x, scale, offset, "k")
    assert codes.dtype == offset.dtype == np.int8
    assert not symmetric or not offset.any()
    error = np.abs(x - affine.dequantize(codes, scale, offset).astype(np.float64))
    assert np.all(error <= scale * HALF_STEP)
    by = groupwise.parameters(flat, (groupwise.WHOLE, 1), "k", symmetric=symmetric)
    np.testing.assert_array_equal(groupwise.quantize(flat, by, "k"), codes.reshape(flat.shape))


def test_channels_by_hand():
    low, high = np.array([-127, 0, 0, -55.0]), np.array([1, 255, 0, 200.0])
    scale, offset = kv_cache.channel_parameters(low, high, "k", symmetric=False)
    # -128 + 127 / (128 / 255) = 125.004; one-sided; all zeros; -128 + 55
    assert offset.tolist() == [125, -128, -128, -73]
    assert scale.tolist() == [np.float32(128 / 255), 1, 1, 1]
    scale, offset = kv_cache.channel_parameters(low, high, "k")
    assert scale.tolist() == [1, np.float32(255) / np.float32(127), 1, np.float32(200 / 127)]
    assert offset.tolist() == [0, 0, 0, 0]
    codes = kv_cache.quantize_channels(np.array([[-500, 300, 0, 200]]), scale, offset, "k")
    assert codes.tolist() == [[-128, 127, 0, 127]]  # beyond the observed range: clips


@settings(max_examples=30, deadline=None)
@given(x=CACHES)
def test_tokens(x):
    codes, scale = kv_cache.quantize_tokens(x, "v")
    assert codes.dtype == np.int8
    assert scale.shape == (*x.shape[:-1], 1)
    error = np.abs(x - affine.dequantize(codes, scale).astype(np.float64))
    assert np.all(error <= scale * HALF_STEP)
    for index in np.ndindex(x.shape[:-1]):
        absmax = max(abs(float(value)) for value in x[index])
        wanted = np.float32(absmax) / np.float32(127)
        assert scale[index] == (wanted if wanted >= affine.SMALLEST_SCALE else 1)


def test_refusals():
    scale, offset = np.ones(3, np.float32), np.zeros(3, np.int8)
    with pytest.raises(
        MsQuantError, match=r"k: scale \(3,\) and offset \(3,\) do not fit \(2, 4\)"
    ):
        kv_cache.quantize_channels(np.ones((2, 4)), scale, offset, "k")
    with pytest.raises(MsQuantError, match="k: 1 of 3 values are NaN or inf"):
        kv_cache.quantize_channels(np.array([0, np.nan, 1]), scale, offset, "k")
    with pytest.raises(MsQuantError, match="v: 1 of 3 values are NaN or inf"):
        kv_cache.quantize_tokens(np.array([0, np.inf, 1]), "v")
    with pytest.raises(MsQuantError, match="k: 1 of 3 values are NaN or inf"):
        kv_cache.channel_parameters(np.zeros(3), np.array([0, np.inf, 1]), "k")
    with pytest.raises(MsQuantError, match=r"k: ranges of \(3,\) and \(2,\)"):
        kv_cache.channel_parameters(np.zeros(3), np.zeros(2), "k")
