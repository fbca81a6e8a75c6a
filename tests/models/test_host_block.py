"""The decoder layer that calibration runs, against MindSpore's operators and by its parts."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from ms_quant import kernels
from ms_quant.kernels import block as kernels_block
from ms_quant.kernels import packing
from ms_quant.models.config import ModelConfig, parse_config
from ms_quant.models.host_block import HostBlock, linear_function
from ms_quant.numerics.activation import Seen
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


def loaded(config: ModelConfig, length: int = LENGTH) -> HostBlock:
    made, shapes = HostBlock(config, length), config.block(0).tensors
    seeds = {name: seed for seed, name in enumerate(shapes)}
    made.load(lambda name: random(shapes[name], seeds[name]) + name.endswith("norm.weight"))
    return made


@pytest.mark.parametrize("model", MODELS)
def test_it_computes_what_mindspore_does(model, native, monkeypatch):
    ms = pytest.importorskip("mindspore")
    from ms_quant.cells import decoder, direct

    for module in (decoder, direct):
        monkeypatch.setattr(module, "has_kernels", lambda: False)
    config = config_of(model)
    ours, theirs, x = loaded(config), decoder.DecoderBlock(config), random((3, LENGTH, 24), 99)
    for name, parameter in theirs.parameters_and_names():
        parameter.set_data(ms.Tensor(ours.arrays[name]))
    angles, mask = decoder.rope_tensors(config, 0, LENGTH), decoder.causal_mask(LENGTH)
    middle = theirs.attend(ms.Tensor(x), *angles, mask)
    np.testing.assert_allclose(ours.attend(x), middle.asnumpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        ours.feed_forward(ours.attend(x)),
        theirs.feed_forward(middle).asnumpy(),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_layer_without_positions(native, monkeypatch):
    """It computes what the Cells do, and does not see the order of earlier tokens."""
    ms = pytest.importorskip("mindspore")
    from ms_quant.cells import decoder, direct

    for module in (decoder, direct):
        monkeypatch.setattr(module, "has_kernels", lambda: False)
    config = replace(config_of("llama"), num_layers=2, unrotated=(1,))
    ours, theirs, x = loaded(config), decoder.DecoderBlock(config), random((2, LENGTH, 24), 99)
    for name, parameter in theirs.parameters_and_names():
        parameter.set_data(ms.Tensor(ours.arrays[name]))
    swapped, mask = x[:, [1, 0, *range(2, LENGTH)]], decoder.causal_mask(LENGTH)
    for index in (0, 1):
        ours.index = index
        angles = decoder.rope_tensors(config, 0, LENGTH, config.rotates(index))
        expected = theirs.attend(ms.Tensor(x), *angles, mask).asnumpy()
        np.testing.assert_allclose(ours.attend(x), expected, rtol=1e-5, atol=1e-5)
        moved = np.abs(ours.attend(swapped)[:, 2:] - ours.attend(x)[:, 2:]).max()
        assert moved < 1e-5 if index else moved > 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_linears_in_place_of_its_own(model, native):
    """Each is called once, with the rows of all windows, and its outputs go on."""
    config = config_of(model)
    block, x, seen = loaded(config), random((2, LENGTH, 24), 99), []

    def watched(path: str):
        return lambda rows: seen.append((path, rows.shape)) or block.linear(path, rows)

    linears = {path: watched(path) for path in config.block(0).linears}
    y = block.feed_forward(block.attend(x, linears), linears)
    np.testing.assert_array_equal(y, block.feed_forward(block.attend(x)))
    expected = [
        (path, (2 * LENGTH, linear.in_features)) for path, linear in config.block(0).linears.items()
    ]
    assert sorted(seen) == sorted(expected)
    silent = {"mlp.down_proj": lambda rows: np.zeros((len(rows), 24), np.float32)}
    np.testing.assert_array_equal(block.feed_forward(x, silent), x)


def test_the_cache_sees_rotated_keys(native):
    """And what it gives is what the queries read."""
    block, x, seen = loaded(config_of("qwen3")), random((2, LENGTH, 24), 99), []

    def cache(keys, values):
        seen.append((keys.copy(), values.copy()))
        return keys, 0 * values

    np.testing.assert_array_equal(block.attend(x, cache=cache), x)
    ((keys, values),) = seen
    rows = block._norm("input_layernorm", x).reshape(-1, 24)
    heads = block.linear("self_attn.v_proj", rows).reshape(2, LENGTH, 2, 8)
    np.testing.assert_array_equal(values, heads.transpose(0, 2, 1, 3))
    k = block._norm("self_attn.k_norm", block.linear("self_attn.k_proj", rows).reshape(heads.shape))
    cos, sin = (angles[:, None] for angles in block.angles)
    turned = k * cos + np.concatenate((-k[..., 4:], k[..., :4]), axis=-1) * sin
    np.testing.assert_allclose(keys, turned.transpose(0, 2, 1, 3), rtol=1e-5, atol=1e-6)


DYNAMIC = "W8A8_DYNAMIC", "W4A8_DYNAMIC", "W8A16", "W8A8_MXFP8"


@pytest.mark.parametrize(
    ("scheme", "smooth", "rotated"),
    [("W8A8", False, False), *product(DYNAMIC, [False, True], [False, True])],
)
def test_a_quantized_linear_as_a_function(scheme, smooth, rotated, native):
    made, x, weight = get_scheme(scheme), random((9, 64), 0), random((33, 64), 1)
    grid = made.weight.fit(weight, "weight")
    one = np.ones(64, np.float32)
    seen = Seen(-one, one, np.dtype(np.float32), "x")
    linear = QuantizedLinear(
        grid.round(weight),
        grid,
        random((33,), 2),
        made.activation.fit(seen, None),
        np.abs(random((64,), 3)) + np.float32(0.5) if smooth else None,
        Kronecker(random((8, 8), 4), random((8, 8), 5)) if rotated else None,
    )
    expected = linear.forward(x)
    np.testing.assert_allclose(linear_function(linear)(x), expected, rtol=1e-5, atol=1e-5)
