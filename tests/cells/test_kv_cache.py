"""The int8 key-value cache against its definition in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Tensor

from ms_quant.cells.kv_cache import Int8KeyValueCache
from ms_quant.numerics import affine, kv_cache

CACHED = ("self_attn.k_proj", "self_attn.v_proj")

pytestmark = pytest.mark.usefixtures("blocking_mindspore")


def by_token(x: np.ndarray) -> np.ndarray:
    """(B, heads, S, D) to (B, S, heads * D)."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def random(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(rng.standard_normal((1, *shape[1:2], 1, shape[3])))
    x[:, 0, :, 0] = 0  # a channel of zeros
    x[0, :, 0] = 0  # a token of zeros
    return x.astype(np.float32)


@pytest.mark.parametrize("static", [True, False])
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    size=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_what_is_read_is_what_the_codes_stand_for(static, batch, heads, size, lengths, seed):
    whole = [random(seed + i, (batch, heads, sum(lengths), size)) for i in range(2)]
    flat = [by_token(x) for x in whole]
    absmax = [np.abs(x).max(axis=(0, 1)) * np.float32(0.9) for x in flat]  # some values clip
    scales = [kv_cache.channel_scale(a, np.dtype(np.float32), "x") for a in absmax]
    cache = Int8KeyValueCache(dict(zip(CACHED, scales, strict=True)) if static else None)
    start, found = 0, ()
    for length in lengths:
        assert cache.length == start
        part = [Tensor(np.ascontiguousarray(x[:, :, start : start + length])) for x in whole]
        found = cache.append(*part)
        start += length
    for x, scale, codes, y in zip(flat, scales, (cache.keys, cache.values), found, strict=True):
        if static:
            expected = kv_cache.quantize_channels(x, scale, "x")
        else:
            expected, scale = kv_cache.quantize_tokens(x, "x")
        assert codes.dtype == ms.int8  # a quarter of the memory
        np.testing.assert_array_equal(by_token(codes.asnumpy()), expected)
        np.testing.assert_array_equal(by_token(y.asnumpy()), affine.dequantize(expected, scale))
