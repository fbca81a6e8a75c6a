"""Multi-head latent attention: with its cache it computes what it does without."""

from __future__ import annotations

import numpy as np
import pytest
from routed_models import DEEPSEEK

from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.cache import Int8KeyValueCache, Int8LatentCache, KeyValueCache
from ms_quant.models.config import ModelConfig, parse_config

LENGTH = 21


def block(config: ModelConfig, seed: int = 0) -> BlockForward:
    rng, index = np.random.default_rng(seed), 1
    shapes = config.block(index).tensors
    arrays = {
        name: (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in shapes.items()
    }
    return BlockForward(config, index, arrays, {})


@pytest.mark.parametrize("rank", [32, None])
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("parts", [[1] * LENGTH, [17, 1, 3], [1, 20]], ids=str)
def test_token_by_token_it_gives_what_all_tokens_at_once_do(rank, interleave, parts):
    config = parse_config({**DEEPSEEK, "q_lora_rank": rank, "rope_interleave": interleave})
    one = block(config)
    x = np.random.default_rng(1).normal(size=(2, LENGTH, 64)).astype(np.float32)
    whole = one.branch(0, x, Positions(config, LENGTH))
    cache, start, found = KeyValueCache(), 0, []
    for count in parts:
        at = Positions(config, start + count, start)
        found.append(one.branch(0, x[:, start : start + count], at, cache))
        start += count
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, atol=3e-5)
    assert cache._keys._held.shape[3] == 8 and cache._values._held.shape[3] == 32


@pytest.mark.parametrize("parts", [[1] * LENGTH, [17, 1, 3]], ids=str)
def test_in_int8_too(parts):
    config = parse_config(DEEPSEEK)
    one = block(config)
    x = np.random.default_rng(1).normal(size=(2, LENGTH, 64)).astype(np.float32)
    steps = {"fa_q": 4, "fa_k": 1, "fa_v": 1}
    scales = {name: np.full(count, 0.03, np.float32) for name, count in steps.items()}
    cached = Int8LatentCache(scales)
    whole = one.branch(0, x, Positions(config, LENGTH), cached)
    exact = one.branch(0, x, Positions(config, LENGTH))
    assert 0 < np.abs(whole - exact).max() < 0.1 * np.abs(exact - x).max()
    cache, start, found = Int8LatentCache(scales), 0, []
    for count in parts:
        at = Positions(config, start + count, start)
        found.append(one.branch(0, x[:, start : start + count], at, cache))
        start += count
    np.testing.assert_array_equal(
        cache._values._held[:, :, :LENGTH], cached._values._held[:, :, :LENGTH]
    )
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, atol=3e-5)


def test_a_cache_of_int8_holds_the_latent_vectors():
    config = parse_config(DEEPSEEK)
    one = block(config)
    x = np.random.default_rng(1).normal(size=(1, LENGTH, 64)).astype(np.float32)
    exact, codes = KeyValueCache(), Int8KeyValueCache()
    for start in range(LENGTH):
        at = Positions(config, start + 1, start)
        row = x[:, start : start + 1]
        expected = one.branch(0, row, at, exact)
        found = one.branch(0, row, at, codes)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.02


def test_the_values_edge_skips_the_rows_of_keys():
    config = parse_config(DEEPSEEK)
    edge = config.block(1).edge_of("self_attn.o_proj")
    assert edge.producer == "self_attn.kv_b_proj"
    columns = np.arange(1, 65, dtype=np.float32)
    rows = edge.rows(columns)
    assert rows.shape == (4 * 32,)
    assert (rows.reshape(4, 32)[:, :16] == 1).all()
    assert np.array_equal(edge.columns(rows), columns)
    assert np.array_equal(edge.read(rows).reshape(4, 32)[:, :16], np.zeros((4, 16)))
