"""The int8 KV cache: golden values, the bound of half a step, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ms_quant.errors import MsQuantError
from ms_quant.numerics import affine, kv_cache
from ms_quant.numerics.storage import DTYPES

HALF_STEP = 0.5 + 2.0**-14  # see test_affine.py
F32 = DTYPES["float32"]
CACHES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(0, 3), st.integers(1, 2), st.integers(1, 5)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=30, deadline=None)
@given(x=CACHES)
def test_channels(dtype, x):
    absmax = np.abs(x).reshape(-1, x.shape[-1]).max(axis=0, initial=0)
    scale = kv_cache.channel_scale(absmax, DTYPES[dtype], "k")
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(scale.astype(DTYPES[dtype]).astype(np.float32), scale)
    codes = kv_cache.quantize_channels(x, scale, "k")
    assert codes.dtype == np.int8
    error = np.abs(x - affine.dequantize(codes, scale).astype(np.float64))
    assert np.all(error <= scale * HALF_STEP)


def test_channels_by_hand():
    scale = kv_cache.channel_scale(np.array([127, 255, 0, 200.0]), F32, "k")
    assert scale.tolist() == [1, np.float32(255) / np.float32(127), 1, np.float32(200 / 127)]
    codes = kv_cache.quantize_channels(np.array([[-500, 300, 0, 200]]), scale, "k")
    assert codes.tolist() == [[-128, 127, 0, 127]]  # beyond the observed range: clips
    narrow = kv_cache.channel_scale(np.array([200.0]), DTYPES["bfloat16"], "k")
    assert narrow.tolist() == [1.578125]  # 1.5748 lies between 1.5703125 and this


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
    scale = np.ones(3, np.float32)
    with pytest.raises(MsQuantError, match=r"k: scale \(3,\) does not fit \(2, 4\)"):
        kv_cache.quantize_channels(np.ones((2, 4)), scale, "k")
    with pytest.raises(MsQuantError, match="k: 1 of 3 values are NaN or inf"):
        kv_cache.quantize_channels(np.array([0, np.nan, 1]), scale, "k")
    with pytest.raises(MsQuantError, match="v: 1 of 3 values are NaN or inf"):
        kv_cache.quantize_tokens(np.array([0, np.inf, 1]), "v")
    with pytest.raises(MsQuantError, match="k: 1 of 3 values are NaN or inf"):
        kv_cache.channel_scale(np.array([0, np.inf, 1]), F32, "k")
    with pytest.raises(MsQuantError, match=r"k: 78740\.2 does not fit float16"):
        kv_cache.channel_scale(np.array([1e7]), DTYPES["float16"], "k")
