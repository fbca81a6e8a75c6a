"""The forward of a block against its definition, by its parts and with a cache."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from slow_decoder import SlowDecoder

from ms_quant import kernels
from ms_quant.kernels import block as kernels_block
from ms_quant.kernels import packing
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.cache import KeyValueCache
from ms_quant.models.config import ModelConfig, parse_config
from ms_quant.models.linear_forward import QuantizedForward
from ms_quant.numerics.activation import ObservedRange
from ms_quant.numerics.linear import Kronecker, QuantizedLinear
from ms_quant.schemes.table import get_scheme

SHAPE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3"},
    "qwen2": {"model_type": "qwen2", "head_dim": 4},
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
}
LENGTH = 19  # queries enough for the kernel


@pytest.fixture(params=[True, False], ids=["native", "numpy"])
def native(request, monkeypatch) -> bool:
    if request.param and not kernels.available():
        pytest.skip("no C++ compiler at install time")
    if not request.param:
        for module in (kernels_block, packing.native):
            monkeypatch.setattr(module, "available", lambda: False)
    return request.param


def config_of(model: str) -> ModelConfig:
    return parse_config(SHAPE | MODELS[model])


def random(shape: tuple[int, ...], seed: int, spread: float = 0.3) -> np.ndarray:
    return (spread * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def tensors_of(config: ModelConfig) -> dict[str, np.ndarray]:
    shapes = config.parameter_shapes()
    return {
        name: random(shape, seed) + name.endswith("norm.weight")
        for seed, (name, shape) in enumerate(shapes.items())
    }


def loaded(config: ModelConfig, index: int = 0) -> BlockForward:
    return BlockForward.load(config, index, tensors_of(config).__getitem__)


@pytest.mark.parametrize("model", MODELS)
def test_it_computes_what_the_definition_says(model, native):
    config, x = config_of(model), random((3, LENGTH, 24), 99)
    slow, block = SlowDecoder(config, tensors_of(config)), loaded(config)
    found = block(x, Positions(config, LENGTH))
    for window, y in zip(x.astype(np.float64), found, strict=True):
        np.testing.assert_allclose(y, slow.block(0, window), rtol=1e-5, atol=1e-5)


def test_a_layer_without_positions(native):
    """It does not see the order of earlier tokens."""
    config = replace(config_of("llama"), num_layers=2, unrotated=(1,))
    x, at = random((2, LENGTH, 24), 99), Positions(config, LENGTH)
    swapped, slow = x[:, [1, 0, *range(2, LENGTH)]], SlowDecoder(config, tensors_of(config))
    for index in (0, 1):
        ours = loaded(config, index)
        expected = slow.block(index, x[1].astype(np.float64))
        np.testing.assert_allclose(ours(x, at)[1], expected, rtol=1e-5, atol=1e-5)
        moved = np.abs(ours.branch(0, swapped, at)[:, 2:] - ours.branch(0, x, at)[:, 2:]).max()
        assert moved < 1e-5 if index else moved > 1e-3


@pytest.mark.parametrize("first_tokens", [1, 64])
@pytest.mark.parametrize("parts", [(LENGTH,), (1,) * LENGTH, (4, 1, 1, LENGTH - 6)])
def test_a_cache_gives_the_same_in_parts(parts, first_tokens, native):
    config, x = config_of("qwen3"), random((2, LENGTH, 24), 99)
    block, cache, start, found = loaded(config), KeyValueCache(first_tokens), 0, []
    for length in parts:
        at = Positions(config, start + length, start)
        found.append(block(x[:, start : start + length], at, cache))
        start += length
    assert cache.length == LENGTH
    whole = block(x, Positions(config, LENGTH))
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_linears_in_place_of_its_own(model, native):
    """Each is called once, with the rows of all windows, and its outputs go on."""
    config = config_of(model)
    block, x, seen = loaded(config), random((2, LENGTH, 24), 99), []
    at = Positions(config, LENGTH)

    def watched(path: str):
        return lambda rows: seen.append((path, rows.shape)) or block.linears[path](rows)

    other = block.with_linears({path: watched(path) for path in config.block(0).linears})
    np.testing.assert_array_equal(other(x, at), block(x, at))
    expected = [
        (path, (2 * LENGTH, spec.in_features)) for path, spec in config.block(0).linears.items()
    ]
    assert sorted(seen) == sorted(expected)
    silent = {"mlp.down_proj": lambda rows: np.zeros((len(rows), 24), np.float32)}
    np.testing.assert_array_equal(block.with_linears(silent).branch(1, x, at), x)
    assert block.linears["mlp.down_proj"] is not silent["mlp.down_proj"]


def test_the_cache_sees_rotated_keys(native):
    """And what it gives is what the queries read."""
    config, x, seen = config_of("qwen3"), random((2, LENGTH, 24), 99), []

    class Cache(KeyValueCache):
        def extend(self, keys, values):
            seen.append((keys.copy(), values.copy()))
            return keys, 0 * values

    at = Positions(config, LENGTH)
    np.testing.assert_array_equal(loaded(config).branch(0, x, at, Cache()), x)
    slow = SlowDecoder(config, tensors_of(config))
    for window, *found in zip(x, *seen[0], strict=True):
        expected = slow.queries_keys_values(0, window.astype(np.float64))[1:]
        for part, exact in zip(found, expected, strict=True):
            np.testing.assert_allclose(part, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smooth", [False, True])
def test_phases_are_told_apart(smooth, native):
    """A phased linear is per token in prefill and static in decode; others are what they were."""
    config, x = config_of("qwen3"), random((2, LENGTH, 24), 99)
    made, tensors = get_scheme("W8A8_MIX"), tensors_of(config)

    def quantized(path: str) -> QuantizedLinear | None:
        if "mlp" not in path:
            return None
        weight = tensors[f"{path}.weight"]
        grid, one = made.weight.fit(weight, "weight"), np.ones(weight.shape[1], np.float32)
        activation = made.activation.fit(ObservedRange(-one, one, np.dtype(np.float32), "x"), None)
        vector = np.full(weight.shape[1], 2, np.float32) if smooth else None
        return QuantizedLinear(grid.round(weight), grid, None, activation, vector)

    block = BlockForward.load(config, 0, tensors.__getitem__, quantized)
    at = Positions(config, LENGTH)
    for which, decode in ((block, False), (block.in_decode(), True)):
        rows = x.reshape(-1, 24)
        linear = quantized("model.layers.0.mlp.up_proj")
        expected = linear.forward(rows, decode)
        np.testing.assert_array_equal(which.linears["mlp.up_proj"](rows), expected)
    assert not np.array_equal(block.branch(1, x, at), block.in_decode().branch(1, x, at))
    plain = block.linears["self_attn.q_proj"]
    assert block.in_decode().linears["self_attn.q_proj"] is plain


DYNAMIC = "W8A8_DYNAMIC", "W4A8_DYNAMIC", "W8A16", "W8A8_MXFP8"


@pytest.mark.parametrize(
    ("scheme", "smooth", "rotated"),
    [("W8A8", False, False), *product(DYNAMIC, [False, True], [False, True])],
)
def test_a_quantized_linear_as_a_function(scheme, smooth, rotated, native):
    made, x, weight = get_scheme(scheme), random((9, 64), 0), random((33, 64), 1)
    grid = made.weight.fit(weight, "weight")
    one = np.ones(64, np.float32)
    seen = ObservedRange(-one, one, np.dtype(np.float32), "x")
    linear = QuantizedLinear(
        grid.round(weight),
        grid,
        random((33,), 2),
        made.activation.fit(seen, None),
        np.abs(random((64,), 3)) + np.float32(0.5) if smooth else None,
        Kronecker(random((8, 8), 4), random((8, 8), 5)) if rotated else None,
    )
    expected = linear.forward(x)
    np.testing.assert_allclose(QuantizedForward(linear)(x), expected, rtol=1e-5, atol=1e-5)
