"""Our decoders against transformers: same weights, same tokens, logits equal up to rounding.

The golden files come from ``tools/make_golden_logits.py``; no torch is needed here.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_quant import kernels
from ms_quant.models.attention import causal_mask
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.config import ModelConfig, parse_config
from ms_quant.models.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "logits"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
ROPE_CASES = [name for name in CASES if "yarn" in name or name.endswith(("linear", "llama3"))]
ROUNDOFF = 2.0**-24
Tensors = dict[str, np.ndarray]
Forward = Callable[..., np.ndarray]


def _golden_weights():
    spec = importlib.util.spec_from_file_location(
        "golden_weights", ROOT / "tools" / "golden_weights.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = _golden_weights()


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def stored_config(name: str) -> ModelConfig:
    """Without the layers that predict further tokens: transformers has none."""
    config = parse_config(json.loads(golden(name)["config"].tobytes()), name)
    return replace(config, further_layers=0)


def weights_of(name: str, config: ModelConfig) -> Tensors:
    weights = tool.random_weights(config.parameter_shapes(), int(golden(name)["seed"]))
    assert tool.checksum(weights) == int(golden(name)["checksum"]), (
        "the weights differ from those transformers had: names, shapes or generator"
    )
    return weights


def by_cells(config: ModelConfig, weights: Tensors, ids: np.ndarray, mask: np.ndarray) -> Any:
    """Logits of the MindSpore network."""
    decoder = pytest.importorskip("ms_quant.cells.decoder")
    model = decoder.CausalLM(config)
    parameters = dict(model.parameters_and_names())
    assert sorted(parameters) == sorted(weights)
    for key, parameter in parameters.items():
        parameter.set_data(type(parameter)(weights[key]))
    return decoder.forward(model, ids, mask).asnumpy()


def by_blocks(config: ModelConfig, weights: Tensors, ids: np.ndarray, mask: np.ndarray) -> Any:
    """Logits of the forward that eval and generate run."""
    at = Positions(config, ids.shape[1])
    at.mask = causal_mask(ids.shape[1], mask)
    x = weights["model.embed_tokens.weight"][ids]
    for index in range(config.num_layers):
        x = BlockForward.load(config, index, weights.__getitem__)(x, at)
    x = kernels.rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    return x @ weights["model.embed_tokens.weight" if config.tied else "lm_head.weight"].T


def logits(forward: Forward, config: ModelConfig, weights: Tensors, side: str) -> np.ndarray:
    ids, mask = tool.batch(config.vocab_size, side)
    return tool.kept(forward(config, weights, ids, mask), mask)


def tolerance(config: ModelConfig, expected: np.ndarray) -> float:
    """How far two correct float32 orders of summation may lie apart.

    A sum of K rounded products differs by about sqrt(K) * 2^-24 of its size between orders
    (errors of random sign). Each block chains 9 such steps (2 norms, q/k, scores, softmax, values,
    o, gate/up, down), the head adds 2; their errors pass on and at worst add up. The rotary
    angle of the last position adds its own rounding, 2^-24 * length, once per block.
    """
    stages = 9 * config.num_layers + 2
    terms = max(config.hidden_size, config.intermediate_size)
    angles = config.num_layers * max(tool.LENGTHS)
    return (stages * math.sqrt(terms) + angles) * ROUNDOFF * float(np.abs(expected).max())


OLD_STYLE = {
    "llama_gqa": {"rope_theta": 500.0, "rope_scaling": None},
    "llama_dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama_yarn": {
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.3,
            "beta_fast": 2.0,
            "beta_slow": 0.25,
        },
    },
    "llama3": {
        "rope_theta": 1000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen2_tied_yarn": {
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {"rope_theta": 1000000, "rope_scaling": None},
}


@pytest.mark.parametrize("name", OLD_STYLE)
def test_the_old_style_of_a_config_parses_to_the_same(name):
    """Before transformers 5: rope_theta beside rope_scaling, and torch_dtype."""
    new = json.loads(golden(name)["config"].tobytes())
    gone = ("rope_parameters", "dtype", "layer_types")
    old = {key: value for key, value in new.items() if key not in gone}
    old.update(OLD_STYLE[name], torch_dtype="float32")
    assert "rope_parameters" in new
    assert parse_config(old) == parse_config(new)


def test_every_family_of_transformers_has_golden_logits():
    known = {name for name, family in FAMILIES.items() if not family.custom_code} - {"kimi_k2"}
    assert {stored_config(name).model_type for name in CASES} == known


@pytest.mark.parametrize("forward", [by_cells, by_blocks])
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name, forward):
    config = stored_config(name)
    weights = weights_of(name, config)
    for side in tool.SIDES:
        found, expected = logits(forward, config, weights, side), golden(name)[side]
        np.testing.assert_allclose(
            found, expected, rtol=0, atol=tolerance(config, expected), err_msg=side
        )


@pytest.mark.parametrize("name", ROPE_CASES)
def test_golden_logits_notice_a_wrong_rotary_rule(name):
    """The cases are sharp: without the scaling rule the same model misses by far."""
    config = stored_config(name)
    plain = {"rope_type": "default", "rope_theta": config.rope["rope_theta"]}
    found = logits(by_blocks, replace(config, rope=plain), weights_of(name, config), "right")
    expected = golden(name)["right"]
    assert np.abs(found - expected).max() > 1000 * tolerance(config, expected)
