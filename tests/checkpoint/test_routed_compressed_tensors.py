"""compressed-tensors checkpoints of models with experts, as vLLM reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from served_deepseek import ATTENTION, DENSE, EXPERTS, quantized, source
from slow_deepseek import Vllm, read_tensors

from ms_quant.evaluation.perplexity import token_losses
from ms_quant.formats.opening import open_model
from ms_quant.formats.structure import read_structure
from ms_quant.job.output_directory import RECORD
from ms_quant.verify.checkpoint import verify_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
DYNAMIC = "W8A8_DYNAMIC"
TOKENS = np.random.default_rng(0).integers(0, 2048, 24)
RULES = {
    "int8": [{"scheme": DYNAMIC, "include": [*ATTENTION, *DENSE, *EXPERTS]}],
    "int4": [
        {"scheme": DYNAMIC, "include": [*ATTENTION, *DENSE]},
        {"scheme": "W4A16", "options": {"group_size": 32}, "include": EXPERTS},
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("compressed") / "float")


@pytest.fixture(scope="module")
def int8(model: Path) -> Path:
    return quantized(model, model.with_name("int8"), "compressed-tensors", RULES["int8"])


@pytest.fixture(scope="module")
def int4(model: Path) -> Path:
    return quantized(model, model.with_name("int4"), "compressed-tensors", RULES["int4"])


@pytest.mark.parametrize("kind", RULES)
def test_the_runtime_computes_what_eval_measures(kind, model, request):
    directory = request.getfixturevalue(kind)
    ours = token_losses(open_model(directory), TOKENS[None])[0]
    np.testing.assert_allclose(Vllm(directory).losses(TOKENS), ours, atol=5e-4)
    found = verify_checkpoint(directory, model)
    assert (found.problems, found.made_again) == ((), found.quantized)


@pytest.mark.parametrize("kind", RULES)
def test_what_stays_float_is_ignored_by_its_name(kind, request):
    entry = Vllm(request.getfixturevalue(kind)).entry
    ignored = set(entry["ignore"])
    assert {
        "lm_head",
        "model.layers.0.self_attn.kv_b_proj",
        "model.layers.1.self_attn.kv_b_proj",
        "model.layers.1.mlp.gate",
        "model.layers.2.mlp.gate",
        "model.layers.2.eh_proj",
        "model.layers.2.shared_head.head",
        "model.layers.2.self_attn.q_a_proj",
        "model.layers.2.mlp.experts.7.down_proj",
        "model.layers.2.mlp.shared_experts.up_proj",
    } <= ignored
    assert not any(".1.mlp.experts." in name for name in ignored)


def test_tensors_of_experts(int8, int4, model):
    path = "model.layers.1.mlp.experts.7.down_proj."
    stored = read_tensors(int8)
    assert {name[len(path) :] for name in stored if name.startswith(path)} == {
        "weight",
        "weight_scale",
    }
    assert (stored[path + "weight"].dtype, stored[path + "weight"].shape) == (np.int8, (64, 32))
    assert stored[path + "weight_scale"].shape == (64, 1)
    stored = read_tensors(int4)
    table = {
        "weight_packed": (np.int32, (64, 4)),
        "weight_scale": (BF16, (64, 1)),
        "weight_shape": (np.int64, (2,)),
    }
    for suffix, (dtype, shape) in table.items():
        assert (stored[path + suffix].dtype, stored[path + suffix].shape) == (dtype, shape)
    exact = [float(value) for value in read_tensors(model)[path + "weight"][3].astype(np.float32)]
    scale = float(stored[path + "weight_scale"][3, 0])
    codes = [max(-8, min(7, round(value / scale))) for value in exact]
    words = [sum((code + 8) << 4 * i for i, code in enumerate(codes[j : j + 8])) for j in (0, 8)]
    assert [int(word) & 0xFFFFFFFF for word in stored[path + "weight_packed"][3, :2]] == words


@pytest.mark.parametrize("name", ["self_attn.kv_b_proj", "mlp.gate"])
def test_a_float_linear_that_is_a_target_is_refused_with_the_reason(int8, name, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(int8, output)
    (output / RECORD).unlink()
    path = output / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"].remove(f"model.layers.1.{name}")
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear"]
    path.write_text(json.dumps(config))
    _, problems = read_structure(output)
    reason = "apart for attention" if "kv_b" in name else "chooses other experts"
    assert len(problems) == 1
    assert f"model.layers.1.{name} is a target, expected it in ignore" in problems[0]
    assert reason in problems[0]
