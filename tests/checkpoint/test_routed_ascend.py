"""ascend checkpoints of models with experts, as vllm-ascend reads them."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from routed_models import QWEN, routed_tensors, save_routed
from safetensors.numpy import save_file
from served_deepseek import ATTENTION, DENSE, EXPERTS, MODEL, MTP, OSL, quantized, source
from slow_deepseek import VllmAscend, nibbles, read_tensors

from ms_quant.evaluation.perplexity import token_losses
from ms_quant.formats.opening import open_model
from ms_quant.verify.checkpoint import verify_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
DYNAMIC = "W8A8_DYNAMIC"
TOKENS = np.random.default_rng(0).integers(0, 2048, 24)
RULES = {
    "int8": [
        {"scheme": "W8A8", "include": ATTENTION},
        {"scheme": DYNAMIC, "include": [*DENSE, *EXPERTS]},
    ],
    "int4": [
        {"scheme": "W8A8", "include": ATTENTION},
        {"scheme": DYNAMIC, "include": [*DENSE, *MTP]},
        {"scheme": "W4A8_DYNAMIC", "include": EXPERTS},
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("ascend") / "float")


@pytest.fixture(scope="module", params=RULES)
def made(request: pytest.FixtureRequest, model: Path) -> Path:
    steps = OSL if request.param == "int8" else None
    rules = RULES[request.param]
    return quantized(model, model.with_name(request.param), "ascend", rules, steps)


@pytest.fixture(scope="module")
def int4(model: Path) -> Path:
    return quantized(model, model.with_name("int4-bytes"), "ascend", RULES["int4"])


def test_the_runtime_computes_what_eval_measures(made):
    ours = token_losses(open_model(made), TOKENS[None])[0]
    np.testing.assert_allclose(VllmAscend(made).losses(TOKENS), ours, atol=5e-4)


def test_verify_makes_every_linear_again(made, model):
    found = verify_checkpoint(made, model)
    assert (found.problems, found.made_again) == ((), found.quantized)


def test_every_tensor_is_described(made):
    stored = read_tensors(made)
    description = json.loads((made / "quant_model_description.json").read_text())
    named = {key for key in description if "." in key}
    assert named == set(stored)
    for name in (
        "model.layers.1.self_attn.kv_b_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.gate.weight",
        "model.layers.2.enorm.weight",
        "model.layers.2.hnorm.weight",
        "model.layers.2.eh_proj.weight",
        "model.layers.2.embed_tokens.weight",
        "model.layers.2.shared_head.norm.weight",
        "model.layers.2.shared_head.head.weight",
        "lm_head.weight",
    ):
        assert description[name] == "FLOAT", name
    assert (description["group_size"], description["version"]) == (0, "1.0.0")
    assert json.loads((made / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_tensors_of_int4_experts(int4, model):
    stored = read_tensors(int4)
    description = json.loads((int4 / "quant_model_description.json").read_text())
    for name, rows, columns, slices in (("gate", 32, 64, 1), ("down", 64, 32, 16)):
        path = f"model.layers.1.mlp.experts.5.{name}_proj."
        table = {
            "weight": (np.int8, (rows // 2, columns)),
            "weight_scale": (np.float32, (rows, 1)),
            "weight_offset": (np.float32, (rows, 1)),
            "scale_bias": (np.float32, (rows, slices)),
        }
        for suffix, (dtype, shape) in table.items():
            found = stored[path + suffix]
            assert (found.dtype, found.shape) == (dtype, shape)
            assert description[path + suffix] == "W4A8_DYNAMIC"
        assert not stored[path + "weight_offset"].any()
        exact = read_tensors(model)[path + "weight"].astype(np.float32)
        for row in (0, 1):
            step = np.float32(max(map(abs, map(float, exact[row]))) / 7)
            step = np.float32(BF16.type(step))  # the runtime holds scales in the model's type
            found = stored[path + "weight_scale"][row, 0]
            assert found in (step, np.nextafter(BF16.type(step), BF16.type(1)).astype(np.float32))
            codes = [round(float(value) / float(found)) for value in exact[row]]
            codes = [max(-8, min(7, code)) for code in codes]
            byte = [int(value) & 255 for value in stored[path + "weight"][0]]
            assert [(one >> 4 * row) & 15 for one in byte] == [code & 15 for code in codes]
            step = columns // slices
            sums = [
                8 * float(found) * sum(codes[part * step : part * step + step])
                for part in range(slices)
            ]
            np.testing.assert_array_equal(
                stored[path + "scale_bias"][row], np.array(sums, np.float32)
            )
        np.testing.assert_array_equal(
            nibbles(stored[path + "weight"]), open_model(int4).linear(path[:-1]).weight
        )


def test_experts_that_predict_further_tokens_are_int8(int4):
    linear = open_model(int4).linear("model.layers.2.mlp.experts.0.up_proj")
    assert linear.weight.shape == (32, 64) and np.abs(linear.weight).max() == 127


@pytest.mark.parametrize("format", ["ascend", "golden-stick", "compressed-tensors"])
@pytest.mark.parametrize("router", [BF16, np.dtype(np.float32)], ids=str)
def test_a_router_keeps_its_type_and_its_correction_every_bit(format, router, tmp_path):
    directory = source(tmp_path / "float")
    tensors = routed_tensors(MODEL)
    for name, array in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensors[name] = array.astype(router)
        elif "correction" not in name:
            tensors[name] = array.astype(BF16)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    rules = [{"scheme": DYNAMIC, "include": [*DENSE, *EXPERTS]}]
    output = quantized(directory, tmp_path / "out", format, rules)
    stored = read_tensors(output)
    for index in (1, 2):
        for suffix in ("weight", "e_score_correction_bias"):
            name = f"model.layers.{index}.mlp.gate.{suffix}"
            assert stored[name].dtype == tensors[name].dtype
            assert stored[name].tobytes() == tensors[name].tobytes()
    assert verify_checkpoint(output, directory).problems == ()


def test_qwen_moe(tmp_path):
    directory = save_routed(tmp_path / "float", QWEN)
    rules = [
        {"scheme": DYNAMIC, "include": ["*.self_attn.*"]},
        {"scheme": "W4A8_DYNAMIC", "include": ["*.mlp.experts.*"]},
    ]
    output = quantized(directory, tmp_path / "out", "ascend", rules)
    description = json.loads((output / "quant_model_description.json").read_text())
    assert description["model.layers.3.mlp.gate.weight"] == "FLOAT"
    assert description["model.layers.0.mlp.experts.0.gate_proj.scale_bias"] == "W4A8_DYNAMIC"
    assert verify_checkpoint(output, directory).problems == ()
