"""What Golden Stick itself writes, which needs an Ascend to run: made here by its documented table.

Nothing of the product makes these files: scales are of 255 steps, rounded to bfloat16 after the
codes, and quant_bias goes through bfloat16, as its code does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ms_quant.formats.opening import QuantizedModel
from ms_quant.pipeline.convert import convert_checkpoint
from ms_quant.verify.checkpoint import verify_checkpoint

BF16 = ml_dtypes.bfloat16
Tensors = dict[str, np.ndarray]
Change = Callable[[Tensors, dict[str, str]], None]
K_PROJ = "model.layers.0.self_attn.k_proj"


def quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes, and scales rounded to bfloat16 afterwards."""
    scale = np.abs(weight.astype(np.float64)).max(axis=1) * 2 / 255
    codes = np.clip(np.rint(weight / scale[:, None]), -128, 127).astype(np.int8)
    return codes, scale.astype(np.float32).astype(BF16)


def static(path: str, weight: np.ndarray) -> Tensors:
    codes, scale = quantized(weight)
    step, offset = np.float32(0.0213).astype(BF16), -17
    product = np.float32(step) * scale.astype(np.float32)
    total = -(offset * codes.sum(axis=1, dtype=np.int64)).astype(np.float32) * product
    return {
        f"{path}.weight": codes,
        f"{path}.weight_scale": scale,
        f"{path}.weight_offset": np.zeros(len(codes), np.int32),
        f"{path}.input_scale": np.full(weight.shape[1], step, BF16),
        f"{path}.input_offset": np.full(weight.shape[1], offset, np.int8),
        f"{path}.deq_scale": product,
        f"{path}.quant_bias": np.rint(total.astype(BF16).astype(np.float32) / product).astype("i4"),
    }


def dynamic(path: str, weight: np.ndarray) -> Tensors:
    codes, scale = quantized(weight)
    zeros = np.zeros(len(codes), np.int32)
    return {f"{path}.weight": codes, f"{path}.weight_scale": scale, f"{path}.weight_offset": zeros}


SCHEMES: Mapping[str, Callable[[str, np.ndarray], Tensors]] = {
    "W8A8": static,
    "W8A8_DYNAMIC": dynamic,
}


@pytest.fixture
def write(tiny_model: Callable[..., Path], load_tensors: Any, save_tensors: Any) -> Any:
    def make(scheme: str, change: Change = lambda tensors, names: None, **model: Any) -> Path:
        source = tiny_model(**{"family": "qwen2", "layers": 1, **model})
        floats = load_tensors(source)
        out = source.with_name("golden")
        out.mkdir()
        tensors: Tensors = {}
        names: dict[str, str] = {}
        for name, array in floats.items():
            path, _, suffix = name.rpartition(".")
            linear = "_proj" in path
            if linear and suffix == "weight":
                made = SCHEMES[scheme](path, array.astype(np.float32))
                tensors |= made
                names |= dict.fromkeys(made, scheme)
            else:
                tensors[name] = array
                mislabelled = "W4A8_DYNAMIC" if scheme == "W8A8_DYNAMIC" else scheme
                names[name] = mislabelled if linear else "FLOAT"
        change(tensors, names)
        save_tensors(out / "quant-model-00001-of-00001.safetensors", tensors)
        index = dict.fromkeys(tensors, "quant-model-00001-of-00001.safetensors")
        for name, content in (
            ("model.safetensors.index.json", {"metadata": {}, "weight_map": index}),
            ("quantization_description.json", names),
        ):
            (out / name).write_text(json.dumps(content))
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (out / name).write_bytes((source / name).read_bytes())
        return out

    return make


def test_a_static_one_is_computed_from_what_it_states(write: Any, load_tensors: Any) -> None:
    out = write("W8A8", intermediate_size=512)
    found = verify_checkpoint(out)
    assert (found.verdict, found.problems) == ("right as far as can be seen", ())
    stored, model = load_tensors(out), QuantizedModel(out)
    rounded = 0
    for path in model.plan.quantized():
        linear = model.linear(path)
        assert linear is not None
        rounded += linear.stated is not None
        t = {key: stored[f"{path}.{key}"] for key in ("weight", "quant_bias", "deq_scale")}
        x = np.random.default_rng(0).standard_normal((4, t["weight"].shape[1]), np.float32)
        step = stored[f"{path}.input_scale"].astype(np.float32)
        codes = np.clip(np.rint(x / step - 17), -128, 127).astype(np.int64)
        total = codes @ t["weight"].T.astype(np.int64) + t["quant_bias"]
        expected = total.astype(np.float32) * t["deq_scale"]
        if f"{path}.bias" in stored:
            expected += stored[f"{path}.bias"].astype(np.float32)
        np.testing.assert_array_equal(linear.forward(x), expected)
    assert rounded  # bfloat16 did round some quant_bias


def test_a_dynamic_one_calls_its_biases_something_else(write: Any) -> None:
    found = verify_checkpoint(write("W8A8_DYNAMIC"))
    assert (found.verdict, found.problems) == ("right as far as can be seen", ())
    assert len(found.notes) == 3  # q, k and v have one
    assert all("_proj.bias is 'W4A8_DYNAMIC', the other tensors W8" in n for n in found.notes)


@pytest.mark.parametrize("format", ["ascend", "compressed-tensors", "mindie-sd"])
def test_a_dynamic_one_is_converted(write: Any, tmp_path: Path, format: str) -> None:
    out = write("W8A8_DYNAMIC")
    convert_checkpoint(out, tmp_path / "other", format)
    assert verify_checkpoint(tmp_path / "other", tmp_path / "model").problems == ()
    for path in QuantizedModel(out).plan.quantized():
        one, other = (
            QuantizedModel(out).linear(path),
            QuantizedModel(tmp_path / "other").linear(path),
        )
        assert one is not None and other is not None
        np.testing.assert_array_equal(one.float_weight(), other.float_weight())


def test_against_its_source_linears_are_measured(write: Any, tmp_path: Path) -> None:
    out = write("W8A8_DYNAMIC")
    found = verify_checkpoint(out, tmp_path / "model")
    assert (found.problems, found.measured, found.unknown) == ((), 7, ())
    assert all(layer.output_error < 0.05 for layer in found.layers)


def test_against_another_model_it_is_wrong(write: Any, tiny_model: Any) -> None:
    out = write("W8A8_DYNAMIC")
    other = tiny_model("other", family="qwen2", layers=1, seed=7)
    found = verify_checkpoint(out, other)
    assert found.verdict == "wrong"
    assert "no linear gives what those of" in found.problems[0]
    longer = tiny_model("longer", family="qwen2", layers=2)
    assert "another model than" in verify_checkpoint(out, longer).problems[0]


def offset(tensors: Tensors, names: dict[str, str]) -> None:
    tensors[f"{K_PROJ}.weight_offset"][2] = 1


def far_bias(tensors: Tensors, names: dict[str, str]) -> None:
    tensors[f"{K_PROJ}.quant_bias"][2] += 2 + abs(int(tensors[f"{K_PROJ}.quant_bias"][2])) // 50


def far_scale(tensors: Tensors, names: dict[str, str]) -> None:
    tensors[f"{K_PROJ}.weight_scale"][2] *= np.float32(1.1)


def label(tensors: Tensors, names: dict[str, str]) -> None:
    names["lm_head.weight"] = "W8A8"


def weight_only(tensors: Tensors, names: dict[str, str]) -> None:
    names |= {key: "W8A16" for key in names if key.startswith(K_PROJ)}


def attention(tensors: Tensors, names: dict[str, str]) -> None:
    names["fa_quant_type"] = "FAQuant"


def one_scale(tensors: Tensors, names: dict[str, str]) -> None:
    tensors[f"{K_PROJ}.input_scale"] = np.ones(1, BF16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (offset, r"k_proj\.weight_offset: 1 offsets are not 0"),
        (far_bias, r"k_proj\.quant_bias: 1 of 12 values differ from .* more than rounding to bf"),
        (far_scale, r"k_proj\.weight_scale: times input_scale is not deq_scale"),
        (label, r"lm_head\.weight is 'W8A8', expected 'FLOAT'"),
        (weight_only, r"k_proj\.weight is 'W8A16', expected one of FLOAT, W8A8, W8A8_DYNAMIC"),
        (attention, r"fa_quant_type is 'FAQuant', which is not read here"),
        (one_scale, r"k_proj\.input_scale' is bfloat16 \[1\], expected bfloat16 \[16\]"),
    ],
)
def test_what_contradicts_itself_is_wrong(write: Any, change: Change, message: str) -> None:
    problems = verify_checkpoint(write("W8A8", change)).problems
    assert any(re.search(message, problem) for problem in problems), problems
