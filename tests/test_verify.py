"""`ms-quant verify`: one test for each defect, with the hashes made right again."""

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

from ms_quant.checkpoint.atomic import write_json
from ms_quant.checkpoint.finish import RECORD, seal
from ms_quant.errors import MsQuantError
from ms_quant.numerics.linear import QuantizedLinear, quantize_linear, static_activation
from ms_quant.pipeline import QuantizeOptions, quantize_checkpoint
from ms_quant.verify import output_error, verify_checkpoint

pytestmark = pytest.mark.usefixtures("blocking_mindspore")

Tensors = dict[str, np.ndarray]
SHARD, INDEX = "quant-model-00001-of-00001.safetensors", "model.safetensors.index.json"
DESCRIPTION = "quantization_description.json"
Q, K, OUT = (f"model.layers.0.self_attn.{name}_proj" for name in "qko")
GATE, UP, DOWN = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))


@pytest.fixture
def source(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(family="qwen2")


@pytest.fixture
def make(source: Path, tmp_path: Path, calib_text: Path) -> Callable[..., Path]:
    def run(name: str = "out", **changes: Any) -> Path:
        options = {"calib": calib_text, "samples": 2, "seq_len": 16, **changes}
        quantize_checkpoint(QuantizeOptions(source, tmp_path / name, **options))
        return tmp_path / name

    return run


@pytest.fixture
def checkpoint(make: Callable[..., Path]) -> Path:
    return make()


@pytest.fixture
def edit(
    checkpoint: Path,
    load_tensors: Callable[[Path], Tensors],
    save_tensors: Callable[[Path, Tensors], None],
) -> Callable[[Callable[[Tensors], object]], None]:
    """Changes tensors of the checkpoint; index and record follow."""

    def run(change: Callable[[Tensors], object]) -> None:
        tensors = load_tensors(checkpoint)
        change(tensors)
        save_tensors(checkpoint / SHARD, tensors)
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, SHARD)}
        (checkpoint / INDEX).write_text(json.dumps(index))
        seal_again(checkpoint)

    return run


def seal_again(directory: Path) -> None:
    """Makes the record agree with the files as they are now."""
    value = json.loads((directory / RECORD).read_text())
    del value["sha256"]
    for name in value["files"]:
        data = (directory / name).read_bytes()
        value["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_json(directory / RECORD, seal(value))


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None deletes one."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))
    seal_again(path.parent)


def problem(directory: Path, source: Path | None = None) -> str:
    """The only problem there is."""
    problems = verify_checkpoint(directory, source)["problems"]
    assert len(problems) == 1, problems
    return problems[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scheme": "W8A8_DYNAMIC"},
        {"algorithm": "smoothquant", "dtype": "float16", "shard_bytes": 5000},
        {"exclude": ("*.o_proj", "*.0.mlp.up_proj")},
    ],
)
def test_what_was_written_is_right(changes: dict, make: Callable[..., Path], source: Path) -> None:
    result = verify_checkpoint(make(**changes), source)
    assert result["problems"] == []
    fallback = 4 if "exclude" in changes else 0  # two o_proj, one gate_proj with its up_proj
    assert (result["quantized"], result["float"]) == (14 - fallback, fallback)
    assert len(result["layers"]) == 14 - fallback
    assert all(0 < layer["output_error"] < 0.05 for layer in result["layers"])
    json.dumps(result, allow_nan=False)


def test_the_helper_makes_the_hashes_right(checkpoint: Path, edit: Callable) -> None:
    edit(lambda tensors: None)
    assert verify_checkpoint(checkpoint)["problems"] == []


@pytest.mark.parametrize("name", [f"{Q}.deq_scale", f"{K}.bias", "model.norm.weight"])
def test_missing_tensor(name: str, checkpoint: Path, edit: Callable) -> None:
    edit(lambda tensors: tensors.pop(name))
    assert f"tensor '{name}' is missing, expected " in problem(checkpoint)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        (f"{Q}.deq_scale", np.float16, "is float16 [24], expected float32 [24]"),
        (f"{OUT}.input_scale", np.float32, "is float32 [24], expected bfloat16 [24]"),
        (f"{DOWN}.input_offset", np.int32, "is int32 [24], expected int8 [24]"),
        (f"{UP}.weight", ml_dtypes.bfloat16, "is bfloat16 [24, 16], expected int8 [24, 16]"),
    ],
)
def test_wrong_dtype(
    name: str, dtype: type, message: str, checkpoint: Path, edit: Callable
) -> None:
    edit(lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
    assert f"tensor '{name}' {message}" in problem(checkpoint)


def test_wrong_shape(checkpoint: Path, edit: Callable) -> None:
    name = f"{Q}.input_scale"  # one value is what another runtime flag takes, not this one
    edit(lambda tensors: tensors.update({name: tensors[name][:1]}))
    found = problem(checkpoint)
    assert f"tensor '{name}' is bfloat16 [1], expected bfloat16 [16]" in found


def test_unknown_tensor(checkpoint: Path, edit: Callable) -> None:
    edit(lambda tensors: tensors.update({f"{Q}.smooth_scale": np.ones(16, np.float32)}))
    assert f"unknown tensor '{Q}.smooth_scale', expected none" in problem(checkpoint)


def test_description_that_differs_within_a_module(checkpoint: Path) -> None:
    edit_json(checkpoint / DESCRIPTION, **{f"{Q}.bias": "FLOAT"})
    assert f"tensors of {Q} are W8A8 and FLOAT, expected one" in problem(checkpoint)


@pytest.mark.parametrize(("member", "other"), [(K, Q), (UP, GATE)])
def test_fused_linears_of_different_kinds(member: str, other: str, checkpoint: Path) -> None:
    description = json.loads((checkpoint / DESCRIPTION).read_text())
    changes = {key: "FLOAT" for key in description if key.startswith(f"{member}.")}
    edit_json(checkpoint / DESCRIPTION, **changes)
    found = problem(checkpoint)
    assert f"{other} W8A8" in found and f"{member} FLOAT" in found
    assert "expected one scheme, the runtime fuses them" in found


def test_two_schemes(checkpoint: Path) -> None:
    description = json.loads((checkpoint / DESCRIPTION).read_text())
    changes = {key: "W8A8_DYNAMIC" for key in description if key.startswith(f"{DOWN}.")}
    edit_json(checkpoint / DESCRIPTION, **changes)
    assert "mixes the schemes W8A8, W8A8_DYNAMIC, expected one" in problem(checkpoint)


@pytest.mark.parametrize("value", ["W4A4", "w8a8", 8, ["W8A8"]])
def test_unknown_kind(value: object, checkpoint: Path) -> None:
    edit_json(checkpoint / DESCRIPTION, **{"model.norm.weight": value})
    found = problem(checkpoint)
    assert f"model.norm.weight is {value!r}, expected one of FLOAT, W8A8, W8A8_DYNAMIC" in found


def test_unknown_layer_in_the_description(checkpoint: Path) -> None:
    name = "model.layers.2.self_attn.q_proj.weight"
    edit_json(checkpoint / DESCRIPTION, **{name: "W8A8"})
    assert f"names '{name}', expected only the model's tensors" in problem(checkpoint)


def test_tensor_that_the_description_leaves_out(checkpoint: Path) -> None:
    edit_json(checkpoint / DESCRIPTION, **{f"{Q}.quant_bias": None})
    assert f"does not name '{Q}.quant_bias'" in problem(checkpoint)
    changes = {f"{OUT}.{suffix}": None for suffix in ("weight", "deq_scale", "quant_bias")}
    changes |= {f"{OUT}.input_scale": None, f"{OUT}.input_offset": None, f"{Q}.quant_bias": "W8A8"}
    edit_json(checkpoint / DESCRIPTION, **changes)
    assert f"has no entry for {OUT}.weight" in problem(checkpoint)


def test_metadata_in_the_description_is_no_defect(checkpoint: Path) -> None:
    edit_json(checkpoint / DESCRIPTION, version="1.0", group_size=0, tools=["x"])
    assert verify_checkpoint(checkpoint)["problems"] == []


def test_q_k_v_with_different_input_scales(checkpoint: Path, edit: Callable) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{K}.input_scale"][3] *= 2

    edit(change)
    assert problem(checkpoint) == (
        f"{K}.input_scale: differs from that of {Q}, the runtime fuses them"
    )


def test_gate_and_up_with_different_offsets(checkpoint: Path, edit: Callable) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.input_offset"] += 1
        weight = tensors[f"{UP}.weight"].sum(axis=1, dtype=np.int32)
        tensors[f"{UP}.quant_bias"] -= weight  # stays right by itself

    edit(change)
    assert problem(checkpoint) == (
        f"{UP}.input_offset: differs from that of {GATE}, the runtime fuses them"
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{OUT}.deq_scale", np.nan, "holds 1 NaN or infinite values of 16, expected none"),
        (f"{OUT}.input_scale", np.inf, "holds 1 NaN or infinite values of 24, expected none"),
        (f"{OUT}.deq_scale", 0.0, "1 scales are not positive"),
        (f"{DOWN}.input_scale", -1.0, "1 scales are not positive"),
        ("model.norm.weight", np.nan, "holds 1 NaN or infinite values of 16, expected none"),
        (f"{Q}.bias", np.inf, "holds 1 NaN or infinite values of 24, expected none"),
    ],
)
def test_values_that_are_not_finite_or_not_positive(
    name: str, value: float, message: str, checkpoint: Path, edit: Callable
) -> None:
    def change(tensors: Tensors) -> None:
        tensors[name][-1] = value

    edit(change)
    problems = verify_checkpoint(checkpoint)["problems"]
    assert problems
    assert all(name in found for found in problems)
    assert any(message in found for found in problems)


def test_weight_scales_of_a_dynamic_checkpoint(
    make: Callable[..., Path], load_tensors: Callable, save_tensors: Callable
) -> None:
    directory = make("dynamic", scheme="W8A8_DYNAMIC")
    tensors = load_tensors(directory)
    tensors[f"{DOWN}.weight_scale"][2] = 0
    save_tensors(directory / SHARD, tensors)
    seal_again(directory)
    assert f"{DOWN}.weight_scale: 1 scales are not positive" in problem(directory)


def test_offset_that_is_not_uniform(checkpoint: Path, edit: Callable) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{DOWN}.input_offset"][0] += 1

    edit(change)
    assert f"{DOWN}.input_offset: holds different values" in problem(checkpoint)


def test_quant_bias_off_by_one(checkpoint: Path, edit: Callable) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{DOWN}.quant_bias"][5] += 1

    edit(change)
    assert f"{DOWN}.quant_bias: 1 of 16 values differ from" in problem(checkpoint)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantization_entries_of_config_json(key: str, checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", **{key: {"quant_method": "golden-stick"}})
    assert problem(checkpoint).endswith(f"config.json: has {key}, expected none")
    edit_json(checkpoint / "config.json", **{key: None, "text_config": {key: {}}})
    assert problem(checkpoint).endswith(f"config.json: has {key}, expected none")


@pytest.mark.parametrize(
    "name", ["my_quantization_description.json", "quant_model_description.json"]
)
def test_second_description(name: str, checkpoint: Path) -> None:
    shutil.copy(checkpoint / DESCRIPTION, checkpoint / name)
    with pytest.raises(MsQuantError, match=f"has the descriptions .*'{name}'.*expected exactly"):
        verify_checkpoint(checkpoint)


def test_no_description(checkpoint: Path, source: Path) -> None:
    with pytest.raises(MsQuantError, match=r"has the descriptions \[\], expected exactly"):
        verify_checkpoint(unsealed(source))


def unsealed(directory: Path) -> Path:
    """A directory with a record of no files, to see what else is wrong."""
    write_json(directory / RECORD, seal({"files": {}}))
    return directory


@pytest.mark.parametrize("name", [SHARD, INDEX, DESCRIPTION, "config.json", "tokenizer.json"])
def test_changed_byte(name: str, checkpoint: Path) -> None:
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(data.replace(b"1", b"2", 1))
    assert problem(checkpoint) == (
        f"{checkpoint / name}: sha256 differs from {RECORD}, the file was changed"
    )


def test_without_a_record_nothing_is_proved(checkpoint: Path) -> None:
    (checkpoint / RECORD).unlink()
    assert problem(checkpoint).startswith(f"{checkpoint}: has no {RECORD}")


def test_swapped_layers(checkpoint: Path, edit: Callable, source: Path) -> None:
    def change(tensors: Tensors) -> None:
        for suffix in ("weight", "deq_scale", "quant_bias", "input_scale", "input_offset"):
            one, two = (f"model.layers.{i}.mlp.down_proj.{suffix}" for i in (0, 1))
            tensors[one], tensors[two] = tensors[two], tensors[one]

    edit(change)
    assert verify_checkpoint(checkpoint)["problems"] == []  # right by itself
    problems = verify_checkpoint(checkpoint, source)["problems"]
    assert [found.split(":")[0] for found in problems] == [
        f"model.layers.{i}.mlp.down_proj" for i in (0, 1)
    ]
    assert all(f"against {source}, expected at most 0.1" in found for found in problems)


@pytest.mark.parametrize("name", ["model.norm.weight", f"{K}.bias", "lm_head.weight"])
def test_float_tensor_that_differs_from_the_source(
    name: str, checkpoint: Path, edit: Callable, source: Path
) -> None:
    def change(tensors: Tensors) -> None:
        bits = tensors[name].view(np.uint16)
        bits.reshape(-1)[0] ^= 1

    edit(change)
    assert problem(checkpoint, source) == f"{name}: differs from {source} rounded to bfloat16"


def test_source_of_another_shape(
    checkpoint: Path, source: Path, tiny_model: Callable[..., Path]
) -> None:
    other = tiny_model("other", layers=3)
    assert problem(checkpoint, other) == f"{other}: another model than {checkpoint}"


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 3), (-3, 0), (-0.1, 3)])
def test_output_error_probes_the_range_the_linear_was_made_for(low: float, high: float) -> None:
    """One-sided inputs have an offset at an end of int8, where half of a centred probe clips."""
    weight = np.random.default_rng(0).standard_normal((32, 64), np.float32)
    ranges = np.full(64, low, np.float32), np.full(64, high, np.float32)
    activation = static_activation(*ranges, None, np.dtype(ml_dtypes.bfloat16), "x")
    linear = quantize_linear(weight, None, activation, np.dtype(np.float32))
    assert 0 < output_error(linear, weight) < 0.03
    wrong = QuantizedLinear(linear.weight[::-1], linear.weight_scale, None, activation)
    assert output_error(wrong, weight) > 0.5
