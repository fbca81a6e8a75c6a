"""Whole checkpoints that LLM Compressor and msModelSlim wrote: read, verified and converted.

tests/golden/others was made by tools/make_golden_others.py with those tools themselves.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.formats.inspection import inspect_checkpoint
from ms_quant.formats.opening import QuantizedModel
from ms_quant.numerics.linear import QuantizedLinear, folded_bias
from ms_quant.pipeline.convert import convert_checkpoint
from ms_quant.serve.check import serve_check
from ms_quant.verify.checkpoint import verify_checkpoint
from ms_quant.verify.requantize_grid import some_rows
from ms_quant.verify.result import VERDICTS

GOLDEN = Path(__file__).parent / "golden" / "others"
RIGHT, SEEN, WRONG = VERDICTS
KINDS = {
    "llm_compressor_w8a8": "compressed-tensors W8A8_DYNAMIC",
    "llm_compressor_w8a16": "compressed-tensors W8A16",
    "llm_compressor_w4a16": "compressed-tensors W4A16",
    "llm_compressor_w4a16_asym": "compressed-tensors W4A16",
    "llm_compressor_fp8_dynamic": "compressed-tensors W8A8FP8_DYNAMIC",
    "llm_compressor_fp8_block": "compressed-tensors W8A8FP8_BLOCK",
    "msmodelslim_w8a8_qwen2_bf16": "ascend W8A8",
    "msmodelslim_w8a8_qwen2_f16": "ascend W8A8",
    "msmodelslim_w8a8_mix_qwen2_bf16": "ascend W8A8_MIX",
    "msmodelslim_w8a8_quarot_qwen3_bf16": "ascend W8A8",
    "msmodelslim_w8a8_dynamic_qwen3_f32": "ascend W8A8_DYNAMIC",
    "msmodelslim_w4a8_dynamic_qwen3_bf16": "ascend W4A8_DYNAMIC",
    "msmodelslim_wfp8_qwen3_bf16": "ascend W8A8FP8_DYNAMIC",
}
LLM_COMPRESSOR = [name for name in KINDS if name.startswith("llm")]
MSMODELSLIM = [name for name in KINDS if name.startswith("msm")]
STATIC = [name for name in MSMODELSLIM if KINDS[name].endswith(("W8A8", "MIX"))]
Load = Callable[[Path], dict[str, np.ndarray]]


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """A golden checkpoint that may be changed."""

    def copy(name: str) -> Path:
        path = tmp_path / name
        shutil.copytree(GOLDEN / name, path)
        return path

    return copy


def linears(directory: Path) -> dict[str, QuantizedLinear]:
    model, found = QuantizedModel(directory), {}
    for path in model.plan.quantized():
        linear = model.linear(path)
        assert linear is not None
        found[path] = linear
    return found


def test_every_golden_checkpoint_is_named_here() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_it_is_read(name: str) -> None:
    assert inspect_checkpoint(GOLDEN / name)["format"] == KINDS[name]
    blocks = name == "llm_compressor_fp8_block"  # whose o_proj and down_proj were ignored
    assert len(linears(GOLDEN / name)) == (5 if blocks else 7)


@pytest.mark.parametrize("name", LLM_COMPRESSOR)
def test_weights_are_those_that_the_library_decompresses(name: str) -> None:
    expected = json.loads((GOLDEN / name / "expected.json").read_text())["weights"]
    for path, linear in linears(GOLDEN / name).items():
        weight = linear.grid.values(linear.weight).astype(ml_dtypes.bfloat16)
        assert hashlib.sha256(weight.tobytes()).hexdigest() == expected[path]


def as_float32(scale: np.ndarray) -> np.ndarray:
    """deq_scale: float32, or its bits in int64."""
    return scale.astype(np.int32).view(np.float32) if scale.dtype == np.int64 else scale


@pytest.mark.parametrize("name", STATIC)
def test_static_products_are_those_of_the_stored_tensors(name: str, load_tensors: Load) -> None:
    """What the runtime computes from them, whatever they should be."""
    stored = load_tensors(GOLDEN / name)
    for path, linear in linears(GOLDEN / name).items():
        x = np.random.default_rng(1).standard_normal((5, 32), np.float32)
        step, offset = stored[f"{path}.input_scale"][0], stored[f"{path}.input_offset"][0]
        narrow = np.float16 if name.endswith("_f16") else ml_dtypes.bfloat16
        reciprocal = (1 / step).astype(narrow)  # of the type of the runtime's parameters
        codes = np.clip(np.rint(x * reciprocal.astype("f4") + offset), -128, 127).astype(np.int64)
        total = codes @ stored[f"{path}.weight"].T.astype(np.int64) + stored[f"{path}.quant_bias"]
        expected = total.astype(np.float32) * as_float32(stored[f"{path}.deq_scale"])
        np.testing.assert_array_equal(linear.forward(x, decode=True), expected)


@pytest.mark.parametrize("name", [n for n in STATIC if "qwen2" in n])
def test_rows_are_taken_apart_without_the_bias_that_others_rounded(name: str) -> None:
    """As the comparison with a source takes them."""
    x, biases = np.random.default_rng(1).standard_normal((5, 32), np.float32), 0
    for path, linear in linears(GOLDEN / name).items():
        format = QuantizedModel(GOLDEN / name).plan.quantized_layer(path).scheme.weight
        part = some_rows(linear, format, slice(3, 9)).forward(x, decode=True)
        bias = 0 if linear.bias is None else linear.bias[3:9]
        biases += linear.bias is not None
        whole = linear.forward(x, decode=True)[:, 3:9]
        room = 2 * linear.deq_scale[3:9] + np.abs(bias) * 2.0**-7
        assert (np.abs(part + bias - whole) <= room).all()
    assert biases == 3


@pytest.mark.parametrize("name", [n for n in MSMODELSLIM if n not in STATIC or "mix" in n])
def test_dynamic_products_are_those_of_the_stored_tensors(name: str, load_tensors: Load) -> None:
    stored, x = load_tensors(GOLDEN / name), np.random.default_rng(1).standard_normal((5, 32), "f4")
    for path, linear in linears(GOLDEN / name).items():
        codes, limit = stored[f"{path}.weight"], 127
        if "w4a8" in name:  # pairs of outputs, the first in the low nibble
            pairs = codes.view(np.uint8)
            both = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1, codes.shape[1])
            codes = np.where(both > 7, both.astype(np.int8) - 16, both).astype(np.int8)
        weight = codes.astype(np.float32) * stored[f"{path}.weight_scale"]
        scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(448 if "fp8" in name else limit)
        if "fp8" in name:
            seen = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
        else:
            seen = np.clip(np.rint(x / scale), -128, 127) * scale
        bias = stored.get(f"{path}.bias")
        expected = seen @ weight.T + (0 if bias is None else bias)
        np.testing.assert_allclose(linear.forward(x), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", KINDS)
def test_it_is_right_as_far_as_can_be_seen(name: str) -> None:
    found = verify_checkpoint(GOLDEN / name)
    assert (found.verdict, found.problems) == (SEEN, ())
    said = " ".join(found.not_proved)
    assert "there is no ms_quant.json" in said and "which algorithm" in said and "--source" in said
    assert ("calibration" in said) == (name in STATIC)


NOTES = {
    "msmodelslim_wfp8_qwen3_bf16": "calls W8A8FP8_DYNAMIC WFP8AFP8_DYNAMIC",
    "msmodelslim_w8a8_quarot_qwen3_bf16": "optional.quarot: a rotation in the weights",
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_otherwise_is_noted(name: str) -> None:
    found = verify_checkpoint(GOLDEN / name).notes
    notes = [note for note in found if "config.json: rope_theta" not in note]  # transformers 5
    assert (len(notes) < len(found)) == (name in LLM_COMPRESSOR)
    assert len(notes) == (name in NOTES)
    assert NOTES.get(name, "") in " ".join(notes)


TARGETS: list[tuple[str, str]] = [
    ("llm_compressor_w8a8", "ascend"),
    ("llm_compressor_w8a8", "golden-stick"),
    ("llm_compressor_w8a8", "mindie-sd"),
    ("llm_compressor_fp8_dynamic", "ascend"),
    ("msmodelslim_wfp8_qwen3_bf16", "compressed-tensors"),
    ("msmodelslim_w8a8_qwen2_bf16", "mindie-sd"),
    ("msmodelslim_w8a8_quarot_qwen3_bf16", "golden-stick"),
    ("msmodelslim_w8a8_dynamic_qwen3_f32", "compressed-tensors"),
]


@pytest.mark.parametrize(("name", "format"), TARGETS)
def test_it_is_converted_and_what_made_it_is_recorded(
    name: str, format: str, tmp_path: Path
) -> None:
    result = convert_checkpoint(GOLDEN / name, tmp_path / "out", format)
    assert result.format == format
    record = json.loads((tmp_path / "out" / "ms_quant.json").read_text())["record"]
    tool = "LLM Compressor" if name in LLM_COMPRESSOR else "msModelSlim"
    provenance = record["provenance"]
    assert (provenance["made_by"], record["algorithm"]) == (tool, "unknown")
    assert provenance["calibration"] == "no record" and provenance["checkpoint"]["shards"]
    found = verify_checkpoint(tmp_path / "out")
    assert (found.verdict, found.problems) == (SEEN, ())
    assert "ms_quant.json" not in " ".join(found.not_proved)  # the files are ours
    before, after = linears(GOLDEN / name), linears(tmp_path / "out")
    x = np.random.default_rng(2).standard_normal((3, 32), np.float32)
    for path, linear in before.items():
        np.testing.assert_array_equal(linear.weight, after[path].weight)
        if name in STATIC:  # vllm-ascend multiplies by a rounded reciprocal, the others divide
            np.testing.assert_array_equal(linear.deq_scale, after[path].deq_scale)
            made = [folded_bias(one, path) for one in (linear, after[path])]
            np.testing.assert_array_equal(*made)
            continue
        np.testing.assert_array_equal(linear.forward(x), after[path].forward(x))


@pytest.mark.parametrize(("name", "format"), [TARGETS[0], TARGETS[3], TARGETS[4], TARGETS[7]])
def test_there_and_back_the_tensors_are_the_same(
    name: str, format: str, tmp_path: Path, load_tensors: Load
) -> None:
    own = KINDS[name].split()[0]
    convert_checkpoint(GOLDEN / name, tmp_path / "there", format)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", own)
    before, after = load_tensors(GOLDEN / name), load_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, array in before.items():
        np.testing.assert_array_equal(array.view(np.uint8), after[key].view(np.uint8))
    assert verify_checkpoint(tmp_path / "back").verdict == SEEN


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("llm_compressor_fp8_block", "ascend", "no ascend checkpoint can hold it"),
        ("llm_compressor_w4a16", "mindie-sd", "hold it only with group_size 0"),
        ("msmodelslim_w4a8_dynamic_qwen3_bf16", "mindie-sd", "no mindie-sd checkpoint can hold"),
        ("msmodelslim_w8a8_qwen2_bf16", "golden-stick", "quant_bias: is rounded otherwise"),
        ("msmodelslim_w8a8_mix_qwen2_bf16", "golden-stick", "no golden-stick checkpoint can"),
        ("llm_compressor_w8a8", "compressed-tensors", "of format compressed-tensors already"),
    ],
)
def test_what_another_format_does_not_hold_is_refused(
    name: str, format: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(MsQuantError, match=message):
        convert_checkpoint(GOLDEN / name, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def changed(array: np.ndarray, name: str) -> np.ndarray:
    """Some value of a tensor made as wrong as no rounding makes it."""
    array = array.copy()
    if name.endswith("deq_scale"):
        scale = as_float32(array)
        scale[3] *= 1.01
        return scale if array.dtype != np.int64 else scale.view(np.int32).astype(np.int64)
    if name.endswith("quant_bias"):
        array[3] += 2 + abs(int(array[3])) // 8
    elif name.endswith("weight_offset"):
        array[3] = 1
    else:
        array[3] = array[3] * 1.5 + 1
    return array


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("msmodelslim_w8a8_mix_qwen2_bf16", "deq_scale"),
        ("msmodelslim_w8a8_mix_qwen2_bf16", "quant_bias"),
        ("msmodelslim_w8a8_mix_qwen2_bf16", "weight_offset"),
        ("msmodelslim_w8a8_qwen2_bf16", "quant_bias"),
        ("msmodelslim_w8a8_qwen2_f16", "quant_bias"),
        ("msmodelslim_w4a8_dynamic_qwen3_bf16", "scale_bias"),
        ("msmodelslim_wfp8_qwen3_bf16", "weight_offset"),
    ],
)
def test_more_than_rounding_is_wrong(
    name: str, suffix: str, copied: Any, load_tensors: Load, save_tensors: Any
) -> None:
    path, key = copied(name), f"model.layers.0.self_attn.k_proj.{suffix}"
    tensors = load_tensors(path)
    tensors[key] = changed(tensors[key], key)
    save_tensors(next(path.glob("*.safetensors")), tensors)
    found = verify_checkpoint(path)
    assert found.verdict == WRONG
    assert found.problems[0].startswith(f"{key}: 1 ")


@pytest.mark.parametrize("name", ["llm_compressor_w8a8", "llm_compressor_fp8_dynamic"])
def test_serving_is_checked(name: str, copied: Any) -> None:
    found = serve_check(copied(name), "vllm-ascend")
    served = name == "llm_compressor_w8a8"
    assert bool(found["line"]) == served
    if not served:
        assert "W8A8FP8_DYNAMIC in the compressed-tensors format is not served" in str(found)


def test_a_name_that_vllm_ascend_does_not_know_is_refused_there(copied: Any) -> None:
    found = serve_check(copied("msmodelslim_wfp8_qwen3_bf16"), "vllm-ascend")
    assert any("WFP8AFP8_DYNAMIC" in problem for problem in found["problems"])
    assert found["line"] == ""
