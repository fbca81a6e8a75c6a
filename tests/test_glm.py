"""GLM-4: norms after the branches, gate and up in one linear, half of a head turned in pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from exact_rounding import keep
from routed_models import routed_tensors, save_routed

from ms_quant.errors import MsQuantError
from ms_quant.evaluation.generation import Generator
from ms_quant.evaluation.perplexity import perplexity
from ms_quant.formats.opening import open_model
from ms_quant.formats.registry import FORMATS
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.config import load_config, parse_config, written_config
from ms_quant.models.ranks import check_tp
from ms_quant.pipeline.planning import make_plan
from ms_quant.pipeline.request import QuantizeOptions, prepare
from ms_quant.pipeline.run import run_job
from ms_quant.quantization.block import quantize
from ms_quant.quantization.hooks import BlockHooks
from ms_quant.quantization.observe import observe, wanted
from ms_quant.quantization.weights import LoadedWeights
from ms_quant.statistics.activation_range import BlockRanges
from ms_quant.verify.checkpoint import verify_checkpoint
from sparse_compress.layouts.partition import check_tp as check_parts

GLM: dict[str, Any] = {
    "model_type": "glm4",
    "architectures": ["Glm4ForCausalLM"],
    "attention_bias": True,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
FUSED = "model.layers.0.mlp.gate_up_proj"
DATA = {"samples": 12, "seq_len": 32}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_routed(tmp_path / "model", GLM)


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.npz"
    np.savez(path, tokens=windows())
    return path


def windows() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (12, 32)).astype(np.int32)


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("algorithm", ["minmax", "smoothquant"])
def test_every_format_holds_the_linear_by_its_name(
    format: str, algorithm: str, model: Path, calib: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    data = {} if algorithm == "minmax" else {"calib": calib, "smoothing_target": "norm", **DATA}
    run_job(QuantizeOptions(model, output, "W8A8_DYNAMIC", algorithm, formats=(format,), **data))
    result = verify_checkpoint(output, model)
    assert not result.problems and (result.quantized, result.left_float) == (2 * 6, 0)
    made = open_model(output)
    assert made.linear(FUSED).weight.shape == (192, 64)
    exact = perplexity(open_model(model), windows()).loss
    assert perplexity(made, windows()).loss == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC"])
@pytest.mark.parametrize("algorithm", ["smoothquant", "osl", "flexsmooth"])
def test_smoothing_leaves_what_the_block_computes(algorithm: str, scheme: str) -> None:
    """What feeds down_proj is the second half of gate_up_proj; norms after branches stay."""
    config = parse_config(GLM)
    tensors = routed_tensors(GLM)
    hidden = np.random.default_rng(1).normal(size=(6, 24, 64)).astype(np.float32)
    block, at = BlockForward.load(config, 0, tensors.__getitem__), Positions(config, 24)
    dtype = np.dtype(ml_dtypes.bfloat16)
    plan = make_plan(config, scheme, algorithm, dtype=dtype, smoothing_target="norm")
    hooks = BlockHooks(rounding=keep)
    seen = observe(block, at, [hidden], hidden.shape, wanted([plan], 0, hooks))
    made = quantize(plan, LoadedWeights(block, at), seen, hooks)
    assert not [name for name in made.floats if name.startswith("post_mlp")]
    assert "post_self_attn_layernorm.weight" not in made.floats
    arrays = {**block.arrays, **made.floats}
    arrays |= {f"{path}.weight": linear.weight for path, linear in made.linears.items()}
    before, after = (found["mlp.gate_up_proj.weight"] for found in (block.arrays, arrays))
    gain = arrays["post_attention_layernorm.weight"]
    ratio = before * (block.arrays["post_attention_layernorm.weight"] / gain) / after
    np.testing.assert_allclose(ratio[:96], 1, rtol=1e-5)  # of gate the columns alone change
    np.testing.assert_allclose(ratio / ratio[:, :1], 1, rtol=1e-5)
    assert np.ptp(ratio[96:, 0]) > 0.1 or algorithm == "osl"  # which may find that none is best
    again = BlockForward.load(config, 0, lambda name: arrays[name.split(".", 3)[3]])
    np.testing.assert_allclose(again(hidden, at), block(hidden, at), rtol=2e-3, atol=2e-3)


def test_quarot_refuses_norms_after_branches(model: Path, tmp_path: Path) -> None:
    with pytest.raises(MsQuantError, match=r"post_self_attn_layernorm of each glm4 block"):
        prepare(QuantizeOptions(model, tmp_path / "out", "W8A8_DYNAMIC", "quarot"))


def test_a_generation_goes_on_as_it_began(model: Path) -> None:
    generator, prompt = Generator(open_model(model)), np.arange(9)
    tokens = list(generator.generate(prompt, 6))
    for count in range(1, 6):
        longer = np.concatenate([prompt, tokens[:count]])
        assert next(iter(generator.generate(longer, 1))) == tokens[count]


def test_cached_keys_have_the_places_that_runtimes_give_them(model: Path) -> None:
    """The first half of each head is turned in place, two neighbours at a time."""
    config, found = load_config(model), list[np.ndarray]()
    tensors = routed_tensors(GLM)
    block = BlockForward.load(config, 0, tensors.__getitem__)
    x = np.random.default_rng(2).normal(size=(1, 5, 64)).astype(np.float32)
    keys: list[np.ndarray] = []
    watched = block.with_taps(
        {"k": [keys.append], "self_attn.k_proj output": [lambda y: found.append(y.copy())]}
    )
    watched(x, Positions(config, 5))
    made, shown = found[0].reshape(5, 2, 16), keys[0][0].transpose(1, 0, 2)
    for token in range(5):
        np.testing.assert_array_equal(shown[token, :, 8:], made[token, :, 8:])
        for pair in range(4):
            turn = np.exp(1j * token * 10000.0 ** (-2 * pair / 8))
            first, second = 2 * pair, 2 * pair + 1
            expected = (made[token, :, first] + 1j * made[token, :, second]) * turn
            got = shown[token, :, first] + 1j * shown[token, :, second]
            np.testing.assert_allclose(got, expected, atol=1e-5)


def test_float16_sees_the_half_that_is_multiplied() -> None:
    config = parse_config(GLM)
    edge = config.block(0).edge_of("mlp.down_proj")
    ranges = BlockRanges(0)
    made, read = np.full(192, 3.0, np.float32), np.full(96, 1.0, np.float32)
    made[[5, 100]], read[7] = 1e6, 2e5
    ranges.absmax.update({"mlp.gate_up_proj output": made, "mlp.down_proj input": read})
    rows = ranges.rows(config.block(0), edge)
    assert rows[5] == 0 and rows[100] == 1e6 and rows[96 + 7] == 2e5
    assert np.flatnonzero(ranges.divisions(config)["mlp.gate_up_proj"]).tolist() == [100, 103]


def test_ranks_divide_each_half(model: Path) -> None:
    config = load_config(model)
    check_tp(config, 2)
    with pytest.raises(MsQuantError, match="tp is 2, expected 1: glm4 has linears that are two"):
        check_parts(config, 2)


def test_how_much_of_a_head_is_turned_is_written_where_all_read_it() -> None:
    inside = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    raw = {**GLM, "rope_parameters": inside}
    del raw["partial_rotary_factor"]
    config = parse_config(raw)
    assert config.rotary_size == 4
    assert written_config(config)["partial_rotary_factor"] == 0.25
    absent = {key: value for key, value in GLM.items() if key != "partial_rotary_factor"}
    assert written_config(parse_config(absent))["partial_rotary_factor"] == 0.5
    assert parse_config({**absent, "rope_parameters": {**inside}}).rotary_size == 4
    with pytest.raises(MsQuantError, match=r"partial_rotary_factor is 0\.2, which makes 3 of 16"):
        parse_config({**GLM, "partial_rotary_factor": 0.2})
