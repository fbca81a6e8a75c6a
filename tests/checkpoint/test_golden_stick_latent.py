"""golden-stick checkpoints of DeepSeek, as MindFormers reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from served_deepseek import ATTENTION, DENSE, EXPERTS, OSL, quantized, source
from slow_deepseek import MindFormers, nibbles, read_tensors

from ms_quant.errors import MsQuantError
from ms_quant.evaluation.perplexity import token_losses
from ms_quant.formats.opening import open_model
from ms_quant.job.output_directory import RECORD
from ms_quant.pipeline import building
from ms_quant.pipeline.convert import convert_checkpoint
from ms_quant.verify.checkpoint import verify_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
DYNAMIC = "W8A8_DYNAMIC"
TOKENS = np.random.default_rng(0).integers(0, 2048, 24)
KV_A, Q_B = "self_attn.kv_a_proj_with_mqa", "self_attn.q_b_proj"
EVENS_FIRST = [0, 2, 4, 6, 1, 3, 5, 7]  # of the 8 rotary rows of a head


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("latent") / "float")


@pytest.fixture(scope="module")
def int8(model: Path) -> Path:
    rules = [
        {"scheme": "W8A8", "include": ATTENTION},
        {"scheme": DYNAMIC, "include": [*DENSE, *EXPERTS]},
    ]
    return quantized(model, model.with_name("int8"), "golden-stick", rules, OSL)


@pytest.fixture(scope="module")
def int4(model: Path) -> Path:
    rules = [
        {"scheme": "W8A8", "include": ATTENTION},
        {"scheme": DYNAMIC, "include": DENSE},
        {"scheme": "W4A8_DYNAMIC", "options": {"group_size": 32}, "include": EXPERTS},
    ]
    return quantized(model, model.with_name("int4"), "golden-stick", rules)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_runtime_computes_what_eval_measures(kind, request):
    directory = request.getfixturevalue(kind)
    ours = token_losses(open_model(directory), TOKENS[None])[0]
    exact = MindFormers(directory, fused=False).losses(TOKENS)
    np.testing.assert_allclose(exact, ours, atol=2e-4)
    fused = MindFormers(directory).losses(TOKENS)  # norms divided in bfloat16
    assert np.abs(fused - ours).mean() < 0.06  # a few codes, and with them experts, are others


def test_another_order_of_rotary_rows_is_another_model(int8):
    runtime = MindFormers(int8, fused=False)
    before = runtime.losses(TOKENS)
    for name, array in list(runtime.tensors.items()):
        if f"{Q_B}." in name and array.ndim and len(array) == 96:
            runtime.tensors[name] = runtime.evens_first(name, array)
    assert np.abs(runtime.losses(TOKENS) - before).max() > 0.01


def test_rotary_rows_are_stored_evens_first(model, int8):
    stored, opened = read_tensors(int8), open_model(int8)
    for path, unit in ((f"model.layers.1.{KV_A}", 40), (f"model.layers.1.{Q_B}", 24)):
        linear = opened.linear(path)
        order = [
            start + (row if row < unit - 8 else unit - 8 + EVENS_FIRST[row - (unit - 8)])
            for start in range(0, len(linear.weight), unit)
            for row in range(unit)
        ]
        assert order != sorted(order)
        for suffix in ("weight", "deq_scale", "quant_bias"):
            np.testing.assert_array_equal(
                stored[f"{path}.{suffix}"], getattr(linear, suffix)[order], suffix
            )
    name = f"model.layers.2.{Q_B}.weight"  # of the block that predicts further tokens
    np.testing.assert_array_equal(stored[name], read_tensors(model)[name])


def test_halves_apart_are_stored_as_they_are(model, tmp_path):
    plain = source(tmp_path / "plain", rope_interleave=False)
    rules = [{"scheme": DYNAMIC, "include": [*ATTENTION, *DENSE, *EXPERTS]}]
    output = quantized(plain, tmp_path / "out", "golden-stick", rules)
    path = f"model.layers.1.{Q_B}"
    linear = open_model(output).linear(path)
    np.testing.assert_array_equal(read_tensors(output)[f"{path}.weight"], linear.weight)


def test_float_linears_of_a_quantized_model_have_the_order_of_its_others(model, tmp_path):
    rules = [{"scheme": DYNAMIC, "include": [*DENSE, *EXPERTS]}]
    output = quantized(model, tmp_path / "out", "golden-stick", rules)
    name = f"model.layers.1.{KV_A}.weight"
    stored, exact = read_tensors(output)[name], read_tensors(model)[name]
    np.testing.assert_array_equal(stored[:32], exact[:32])
    np.testing.assert_array_equal(stored[32:], exact[32:][EVENS_FIRST])
    opened = open_model(output)
    np.testing.assert_array_equal(opened.tensor(name), exact.astype(np.float32))
    np.testing.assert_array_equal(
        np.concatenate([part for _, part in opened.chunks(name)]), exact.astype(np.float32)
    )
    assert verify_checkpoint(output, model).problems == ()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_verify_makes_every_linear_again(kind, model, request):
    found = verify_checkpoint(request.getfixturevalue(kind), model)
    assert (found.problems, found.made_again) == ((), found.quantized)
    assert "divides the gains of 4 norms by input_scale" in found.notes[0]


def test_a_checkpoint_in_another_order_is_found_by_its_source(int8, model, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(int8, output)
    (output / RECORD).unlink()
    (path,) = output.glob("*.safetensors")
    tensors, path_of_q_b = load_file(path), f"model.layers.1.{Q_B}."
    for suffix in ("weight", "deq_scale", "quant_bias"):
        rows = np.arange(96).reshape(4, 24)
        rows[:, 16:] = rows[:, 16:][:, np.argsort(EVENS_FIRST)]
        tensors[path_of_q_b + suffix] = tensors[path_of_q_b + suffix][rows.ravel()]
    save_file(tensors, path)
    assert verify_checkpoint(output).problems == ()  # no tensor tells
    found = verify_checkpoint(output, model)
    assert any("1 linears are those of" in text for text in found.not_proved)


def test_q_a_and_kv_a_share_the_parameters_of_their_input(int8):
    stored = read_tensors(int8)
    for index in range(2):
        q_a, kv_a = f"model.layers.{index}.self_attn.q_a_proj.", f"model.layers.{index}.{KV_A}."
        for suffix in ("input_scale", "input_offset"):
            assert stored[q_a + suffix].tobytes() == stored[kv_a + suffix].tobytes()
        assert len(np.unique(stored[q_a + "input_scale"])) > 1  # OSL's vector is in it


def test_gains_survive_to_be_divided(int8):
    stored = read_tensors(int8)
    for norm, path in (("input_layernorm", "q_a_proj"), ("self_attn.q_a_layernorm", "q_b_proj")):
        gain = stored[f"model.layers.1.{norm}.weight"].astype(np.float32)
        scale = stored[f"model.layers.1.self_attn.{path}.input_scale"].astype(np.float32)
        made = (gain / scale).astype(BF16).astype(np.float32)
        error = made.astype(np.float64) * scale / gain - 1
        assert np.sqrt(np.mean(error**2)) < 5e-4  # 1.7e-3 for scales that nobody has chosen
        assert np.abs(error).max() < 2**-8


def test_tensors_and_description_of_int8(int8):
    stored = read_tensors(int8)
    description = json.loads((int8 / "quantization_description.json").read_text())
    assert set(description) == set(stored)
    expert, attention = "model.layers.1.mlp.experts.7.down_proj.", f"model.layers.0.{KV_A}."
    table = {
        expert + "weight": (np.int8, (64, 32), DYNAMIC),
        expert + "weight_scale": (BF16, (64,), DYNAMIC),
        attention + "weight": (np.int8, (40, 64), "W8A8"),
        attention + "deq_scale": (np.float32, (40,), "W8A8"),
        attention + "quant_bias": (np.int32, (40,), "W8A8"),
        attention + "input_scale": (BF16, (64,), "W8A8"),
        attention + "input_offset": (np.int8, (64,), "W8A8"),
        "model.layers.0.self_attn.kv_b_proj.weight": (BF16, (128, 32), "FLOAT"),
        "model.layers.1.mlp.gate.weight": (BF16, (8, 64), "FLOAT"),
        "model.layers.1.mlp.gate.e_score_correction_bias": (np.float32, (8,), "FLOAT"),
        "model.layers.2.eh_proj.weight": (BF16, (64, 128), "FLOAT"),
        "model.layers.2.mlp.experts.0.up_proj.weight": (BF16, (32, 64), "FLOAT"),
        "model.layers.2.shared_head.head.weight": (BF16, (2048, 64), "FLOAT"),
    }
    for name, (dtype, shape, kind) in table.items():
        assert (stored[name].dtype, stored[name].shape, description[name]) == (dtype, shape, kind)
    index = json.loads((int8 / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(stored)
    assert "quantization_config" not in json.loads((int8 / "config.json").read_text())


def test_bytes_of_int4(int4, model):
    """Rows 0 and 1 of one group of one expert, made again in plain Python."""
    stored = read_tensors(int4)
    description = json.loads((int4 / "quantization_description.json").read_text())
    assert description["group_size"] == 32
    path = "model.layers.1.mlp.experts.3.gate_proj."
    weight, scale = stored[path + "weight"], stored[path + "weight_scale"]
    assert (weight.dtype, weight.shape) == (np.int8, (16, 64))
    assert (scale.dtype, scale.shape) == (np.uint64, (32, 2))
    exact = read_tensors(model)[path + "weight"].astype(np.float32)
    for row in (0, 1):
        group = [float(value) for value in exact[row, 32:]]
        step = np.float32(max(map(abs, group)) / 7)
        assert int(scale[row, 1]) == int(step.view(np.uint32))
        codes = [round(value / float(step)) for value in group]
        for column, code in enumerate(codes):
            byte = int(weight[0, 32 + column]) & 255
            assert (byte >> 4 * row) & 15 == code & 15  # the even row is in the low nibble
    linear = open_model(int4).linear(path[:-1])
    np.testing.assert_array_equal(nibbles(weight), linear.weight)


def test_scales_that_are_no_floats_are_refused(int4, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(int4, output)
    (output / RECORD).unlink()
    (path,) = output.glob("*.safetensors")
    tensors, name = load_file(path), "model.layers.1.mlp.experts.3.up_proj.weight_scale"
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] |= np.uint64(1 << 40)
    save_file(tensors, path)
    with pytest.raises(MsQuantError, match=r"experts\.3\.up_proj\.weight_scale: 1 of 64 values"):
        open_model(output).linear(name.rpartition(".")[0])


def test_groups_of_two_sizes_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "check_parts", lambda *plan: None)  # which looks at one layer
    sizes = [("0", 32), ("[1-7]", 64)]
    rules = [
        {
            "scheme": "W4A8_DYNAMIC",
            "options": {"group_size": size},
            "include": [f"model.layers.1.mlp.experts.{which}.{{gate,up}}_proj"],
        }
        for which, size in sizes
    ]
    with pytest.raises(MsQuantError, match="group_size is 32 and 64, expected one"):
        quantized(model, tmp_path / "out", "golden-stick", rules)


def test_conversion_knows_the_order(model, tmp_path):
    rules = [{"scheme": DYNAMIC, "include": [*ATTENTION, *DENSE, *EXPERTS]}]
    golden = quantized(model, tmp_path / "golden", "golden-stick", rules)
    ascend = quantized(model, tmp_path / "ascend", "ascend", rules)
    convert_checkpoint(golden, tmp_path / "made", "ascend")
    convert_checkpoint(tmp_path / "made", tmp_path / "back", "golden-stick")
    for one, other in ((tmp_path / "made", ascend), (tmp_path / "back", golden)):
        found, expected = read_tensors(one), read_tensors(other)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert found[name].tobytes() == array.tobytes(), name


def test_codes_of_two_levels_are_none_of_one(model, tmp_path):
    int4 = {"scheme": "W4A8_DYNAMIC", "options": {"group_size": 32}, "include": EXPERTS}
    ascend = quantized(model, tmp_path / "ascend", "ascend", [int4])
    with pytest.raises(MsQuantError, match="hold W4A8_DYNAMIC in different codes"):
        convert_checkpoint(ascend, tmp_path / "made", "golden-stick")


@pytest.mark.parametrize("rules", [[], ATTENTION], ids=["float", "int8"])
def test_biases_go_with_their_rows(rules, tmp_path):
    biased = source(tmp_path / "float", attention_bias=True)
    rules = [{"scheme": DYNAMIC, "include": [*rules, *DENSE, *EXPERTS]}]
    output = quantized(biased, tmp_path / "out", "golden-stick", rules)
    name = f"model.layers.1.{KV_A}.bias"
    stored, exact = read_tensors(output)[name], read_tensors(biased)[name]
    np.testing.assert_array_equal(stored[:32], exact[:32])
    np.testing.assert_array_equal(stored[32:], exact[32:][EVENS_FIRST])
    np.testing.assert_array_equal(open_model(output).tensor(name), exact.astype(np.float32))
    assert verify_checkpoint(output, biased).problems == ()
