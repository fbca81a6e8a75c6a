"""The key-value caches of a forward against their definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant.errors import MsQuantError
from ms_quant.models.cache import Int8KeyValueCache, Int8LatentCache, KeyValueCache
from ms_quant.numerics import affine, kv_cache

CACHED = ("self_attn.k_proj", "self_attn.v_proj")


def by_token(x: np.ndarray) -> np.ndarray:
    """(B, heads, S, D) to (B, S, heads * D)."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def random(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(rng.standard_normal((1, *shape[1:2], 1, shape[3])))
    x[:, 0, :, 0] = 0  # a channel of zeros
    x[0, :, 0] = 0  # a token of zeros
    return x.astype(np.float32)


@pytest.mark.parametrize("kind", ["float", "C8", "C8_DYNAMIC"])
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    size=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    first_tokens=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_what_is_read_is_what_was_kept(kind, batch, heads, size, lengths, first_tokens, seed):
    whole = [random(seed + i, (batch, heads, sum(lengths), size)) for i in range(2)]
    flat = [by_token(x) for x in whole]
    absmax = [np.abs(x).max(axis=(0, 1)) * np.float32(0.9) for x in flat]  # some values clip
    scales = [kv_cache.channel_scale(a, np.dtype(np.float32), "x") for a in absmax]
    cache = KeyValueCache(first_tokens)
    if kind != "float":
        static = dict(zip(CACHED, scales, strict=True)) if kind == "C8" else None
        cache = Int8KeyValueCache(static, first_tokens)
    start, found = 0, ()
    for length in lengths:
        assert cache.length == start
        found = cache.extend(*(x[:, :, start : start + length] for x in whole))
        start += length
    for x, scale, y in zip(flat, scales, found, strict=True):
        expected = x
        if kind == "C8":
            expected = affine.dequantize(kv_cache.quantize_channels(x, scale, "x"), scale)
        elif kind == "C8_DYNAMIC":
            expected = affine.dequantize(*kv_cache.quantize_tokens(x, "x"))
        np.testing.assert_array_equal(by_token(y), expected)


def test_codes_take_a_quarter_of_the_memory():
    keys, cache = random(0, (1, 2, 100, 64)), Int8KeyValueCache(first_tokens=100)
    cache.extend(keys, keys)
    held = [room._held.nbytes for room in (cache._keys, cache._values, *cache._scales)]
    assert sum(held) < 2 * keys.nbytes * 1.5 * (1 / 4 + 1 / 64)


@pytest.mark.parametrize("which", [0, 1])
def test_values_that_are_not_finite_are_refused(which):
    x = [random(i, (1, 2, 3, 4)) for i in range(2)]
    x[which][0, 1, 2, 3] = np.nan
    with pytest.raises(MsQuantError, match=f"cached {('keys', 'values')[which]}"):
        Int8KeyValueCache().extend(*x)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_latent_vectors_have_one_scale_and_queries_one_a_head(lengths, seed):
    rng, tokens = np.random.default_rng(seed), sum(lengths)
    keys = rng.standard_normal((2, 1, tokens, 3)).astype(np.float32)
    latents = rng.standard_normal((2, 1, tokens, 5)).astype(np.float32)
    queries = rng.standard_normal((2, 4, tokens, 5)).astype(np.float32)
    scales = rng.uniform(0.01, 0.03, 4).astype(np.float32), np.array([0.02], np.float32)
    names = "self_attn.fa_q", "self_attn.fa_k", "self_attn.fa_v"
    cache = Int8LatentCache(dict(zip(names, (*scales, scales[1] * 2), strict=True)), 1)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        found = cache.extend(keys[:, :, part], latents[:, :, part])
        start += length
    assert cache.length == tokens and cache._values._held.dtype == np.int8
    np.testing.assert_array_equal(found[0], keys)
    for (i, *at), value in np.ndenumerate(latents):
        code = min(max(round(float(np.float32(value) / scales[1][0])), -128), 127)
        assert found[1][(i, *at)] == np.float32(code) * scales[1][0]
    read = cache.queries(queries)
    for (i, head, *at), value in np.ndenumerate(queries):
        code = min(max(round(float(np.float32(value) / scales[0][head])), -128), 127)
        assert read[(i, head, *at)] == np.float32(code) * scales[0][head]
