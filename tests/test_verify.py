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
from sealed import seal_again

from ms_quant.errors import MsQuantError
from ms_quant.files.atomic import write_json
from ms_quant.files.safetensors_file import SafetensorsFile
from ms_quant.formats.opening import QuantizedModel
from ms_quant.job.output_directory import RECORD
from ms_quant.pipeline.run import QuantizeOptions, run_job
from ms_quant.quantization.activation_record import KEY
from ms_quant.verify.checkpoint import verify_checkpoint

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
        if changes.get("scheme") != "W8A8_DYNAMIC":
            changes = {"calib": calib_text, "samples": 2, "seq_len": 16, **changes}
        run_job(QuantizeOptions(source, tmp_path / name, **changes))
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


def edit_record(directory: Path, change: Callable[[dict], object]) -> None:
    value = json.loads((directory / RECORD).read_text())
    change(value)
    write_json(directory / RECORD, value)
    seal_again(directory)


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None deletes one."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))
    seal_again(path.parent)


def problem(directory: Path, source: Path | None = None) -> str:
    """The only problem there is."""
    problems = verify_checkpoint(directory, source).problems
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
    assert result.problems == ()
    fallback = 4 if "exclude" in changes else 0  # two o_proj, one gate_proj with its up_proj
    assert (result.quantized, result.left_float) == (14 - fallback, fallback)
    assert len(result.layers) == 14 - fallback
    assert all(0 < layer.output_error < 0.05 for layer in result.layers)
    json.dumps(result.as_json(), allow_nan=False)


def test_the_helper_makes_the_hashes_right(checkpoint: Path, edit: Callable) -> None:
    edit(lambda tensors: None)
    assert verify_checkpoint(checkpoint).problems == ()


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
    assert f"{Q}.bias is 'FLOAT', expected 'W8A8'" in problem(checkpoint)
    (checkpoint / RECORD).unlink()  # whoever wrote it, the runtime wants one type for a linear
    assert f"{Q}.bias is 'FLOAT', expected 'W8A8'" in problem(checkpoint)


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
    problems = verify_checkpoint(checkpoint).problems
    assert any(f"{DOWN}.weight_scale' is missing, expected" in text for text in problems)


@pytest.mark.parametrize("value", ["W4A4", "w8a8", 8, ["W8A8"], "W8A8_TIMESTEP"])
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
    assert verify_checkpoint(checkpoint).problems == ()


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
    problems = verify_checkpoint(checkpoint).problems
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


def test_a_float_checkpoint_is_called_so(source: Path) -> None:
    message = "is a float checkpoint, expected a golden-stick checkpoint with quantization_descr"
    with pytest.raises(MsQuantError, match=message):
        verify_checkpoint(source)


def test_a_w8a8sc_checkpoint_is_sent_to_its_verifier(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quant_model_description_w8a8sc.json").write_text("{}")
    with pytest.raises(MsQuantError, match=r"is a W8A8SC checkpoint, .*; sparse-compress verify"):
        verify_checkpoint(tmp_path)


def test_a_directory_with_nothing(tmp_path: Path) -> None:
    with pytest.raises(MsQuantError, match=r"is empty, expected the directory of"):
        verify_checkpoint(tmp_path)
    with pytest.raises(MsQuantError, match="none: no such model directory"):
        verify_checkpoint(tmp_path / "none")


@pytest.mark.parametrize("name", [SHARD, INDEX, DESCRIPTION, "config.json", "tokenizer.json"])
def test_changed_byte(name: str, checkpoint: Path) -> None:
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(data.replace(b"1", b"2", 1))
    assert problem(checkpoint) == (
        f"{checkpoint / name}: sha256 differs from {RECORD}, the file was changed"
    )


def test_without_a_record_it_is_right_as_far_as_can_be_seen(checkpoint: Path, source: Path) -> None:
    assert verify_checkpoint(checkpoint).verdict == "right"
    (checkpoint / RECORD).unlink()
    found = verify_checkpoint(checkpoint)
    assert (found.verdict, found.problems) == ("right as far as can be seen", ())
    assert f"there is no {RECORD}" in found.not_proved[0]
    compared = verify_checkpoint(checkpoint, source)
    assert compared.problems == () and compared.made_again == 0
    assert compared.measured + len(compared.unknown) == compared.quantized
    assert compared.measured > 0


def swap_down(tensors: Tensors) -> None:
    for suffix in ("weight", "deq_scale", "quant_bias", "input_scale", "input_offset"):
        one, two = (f"model.layers.{i}.mlp.down_proj.{suffix}" for i in (0, 1))
        tensors[one], tensors[two] = tensors[two], tensors[one]


def swap_facts(value: dict[str, Any]) -> None:
    facts, (one, two) = value[KEY], (f"model.layers.{i}.down" for i in (0, 1))
    facts[one], facts[two] = facts[two], facts[one]


def test_swapped_layers(checkpoint: Path, edit: Callable, source: Path) -> None:
    edit(swap_down)
    assert len(verify_checkpoint(checkpoint).problems) == 2  # not what the record says
    edit_record(checkpoint, swap_facts)
    assert verify_checkpoint(checkpoint).problems == ()  # right by itself
    problems = verify_checkpoint(checkpoint, source).problems
    for index in (0, 1):
        path = f"model.layers.{index}.mlp.down_proj"
        mine = [found for found in problems if found.startswith(path)]
        assert "of 16 rows do not follow from the source" in mine[0]
        assert f"against {source}, expected at most 0.1" in mine[-1]


def scale_rows(name: str, factor: float, rows: Any = 3) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][rows] = tensors[name][rows] * tensors[name].dtype.type(factor)

    return change


def rebias(tensors: Tensors, path: str) -> None:
    sums = tensors[f"{path}.weight"].sum(axis=1, dtype=np.int32)
    tensors[f"{path}.quant_bias"] = -int(tensors[f"{path}.input_offset"][0]) * sums


def replace_row(path: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{path}.weight"][5] = tensors[f"{path}.weight"][5, ::-1]
        rebias(tensors, path)

    return change


def one_code(path: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        weight = tensors[f"{path}.weight"]
        row, column = np.argwhere(np.abs(weight) < 100)[0]
        weight[row, column] += 1
        rebias(tensors, path)

    return change


# A wrong row or scale may change the whole output by less than a tenth: numbers are made again.
@pytest.mark.parametrize("algorithm", ["minmax", "smoothquant", "osl"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scale_rows(f"{OUT}.deq_scale", 1.5), f"{OUT}.deq_scale: 1 of 16 rows do not follow"),
        (scale_rows(f"{GATE}.deq_scale", 1.07, slice(None)), f"{GATE}.deq_scale: 24 of 24 rows"),
        (scale_rows(f"{DOWN}.deq_scale", 1 + 1e-6), f"{DOWN}.deq_scale: 1 of 16 rows"),
        (replace_row(UP), f"{UP}.weight: "),
        (one_code(K), f"{K}.weight: 1 of 192 values differ from those of the source; ["),
    ],
)
def test_a_consistent_change_is_found_with_the_source(
    algorithm: str,
    change: Callable[[Tensors], None],
    message: str,
    make: Callable[..., Path],
    source: Path,
    load_tensors: Callable,
    save_tensors: Callable,
) -> None:
    directory = make(algorithm=algorithm)
    tensors = load_tensors(directory)
    change(tensors)
    save_tensors(directory / SHARD, tensors)
    seal_again(directory)
    assert verify_checkpoint(directory).problems == ()
    assert verify_checkpoint(directory, source).problems[0].startswith(message)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight_scale", lambda a: a[:1].__imul__(a.dtype.type(1.5)), "weight_scale: 1 of 16 rows"),
        ("weight_scale", lambda a: a.__imul__(a.dtype.type(1.07)), "weight_scale: 16 of 16 rows"),
        ("weight", lambda a: a[4].__iadd__((a[4] < 99).astype("i1")), "weight: "),
    ],
)
def test_a_changed_dynamic_linear_is_found_with_the_source(
    dtype: str,
    name: str,
    change: Callable,
    message: str,
    make: Callable[..., Path],
    source: Path,
    load_tensors: Callable,
    save_tensors: Callable,
) -> None:
    directory = make(scheme="W8A8_DYNAMIC", dtype=dtype)
    tensors = load_tensors(directory)
    change(tensors[f"{DOWN}.{name}"])
    save_tensors(directory / SHARD, tensors)
    seal_again(directory)
    assert verify_checkpoint(directory).problems == ()
    assert verify_checkpoint(directory, source).problems[0].startswith(f"{DOWN}.{message}")


def scale_inputs(factor: float, channels: Any = slice(None)) -> Callable[[Tensors], None]:
    """Input and output scales of every linear, or some channels of the former alone."""

    def change(tensors: Tensors) -> None:
        for name, array in tensors.items():
            if name.endswith(".input_scale"):
                array[channels] = array[channels] * array.dtype.type(factor)
            if name.endswith(".deq_scale") and channels == slice(None):
                array *= np.float32(factor)

    return change


@pytest.mark.parametrize("algorithm", ["minmax", "smoothquant"])
@pytest.mark.parametrize("change", [scale_inputs(1 / 64), scale_inputs(1.5, 3)])
def test_activation_scales_are_those_of_the_record(
    algorithm: str, change: Callable, make: Callable[..., Path], load_tensors, save_tensors
) -> None:
    directory = make(algorithm=algorithm)
    tensors = load_tensors(directory)
    change(tensors)
    save_tensors(directory / SHARD, tensors)
    seal_again(directory)
    problems = verify_checkpoint(directory).problems
    assert len(problems) == 8  # groups of two blocks
    assert all(".input_scale: sha256 differs from ms_quant.json: activ" in p for p in problems)


def forge(record: dict[str, Any], tensors: Tensors, factor: float) -> None:
    """Makes the record agree with changed tensors, its scales times a factor."""
    members = {"qkv": "self_attn.q", "o": "self_attn.o", "gate_up": "mlp.gate", "down": "mlp.down"}
    for name, entry in record[KEY].items():
        prefix, _, group = name.rpartition(".")
        array = tensors[f"{prefix}.{members[group]}_proj.input_scale"].astype("<f4")
        entry["input_scale_sha256"] = hashlib.sha256(array.tobytes()).hexdigest()
        entry["act_scale"] *= factor


@pytest.mark.parametrize(
    ("change", "factor", "message"),
    [
        (scale_inputs(1.5, 3), 1, "rows do not follow from the source"),
        (scale_inputs(1 / 64), 1 / 64, None),  # only running the model tells: see the document
    ],
)
def test_a_forged_record(
    change: Callable,
    factor: float,
    message: str | None,
    make: Callable[..., Path],
    source: Path,
    load_tensors: Callable,
    save_tensors: Callable,
) -> None:
    directory = make(algorithm="smoothquant")
    tensors = load_tensors(directory)
    change(tensors)
    save_tensors(directory / SHARD, tensors)
    edit_record(directory, lambda value: forge(value, tensors, factor))
    assert verify_checkpoint(directory).problems == ()
    problems = verify_checkpoint(directory, source).problems
    assert bool(problems) == bool(message)
    assert message is None or any(message in found for found in problems)


def test_without_smoothing_the_input_scale_is_the_activation_scale(
    checkpoint: Path, load_tensors: Callable, edit: Callable
) -> None:
    edit(scale_inputs(1 / 64))
    tensors = load_tensors(checkpoint)
    edit_record(checkpoint, lambda value: forge(value, tensors, 1))
    problems = verify_checkpoint(checkpoint).problems
    assert len(problems) == 8
    assert f"{OUT.replace('.0.', '.1.')}.input_scale: 24 of 24 values are not" in problems[5]
    assert all("the recorded act_scale without smoothing" in found for found in problems)


QKV = "model.layers.1.qkv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop(KEY), f"{QKV} is None, expected what calibration measured"),
        (lambda v: v[KEY].pop(QKV), f"{QKV} is None, expected what calibration measured"),
        (lambda v: v.update({KEY: [1]}), f"{QKV} is None, expected what calibration measured"),
        (lambda v: v[KEY][QKV].update(act_scale=0.1), "act_scale is 0.1, expected a positive floa"),
        (lambda v: v[KEY][QKV].update(act_scale="1"), "act_scale is '1', expected a positive"),
        (lambda v: v[KEY][QKV].update(act_scale=-1.0), "act_scale is -1.0, expected a positive"),
        (lambda v: v[KEY][QKV].update(act_scale=2.0**126), "expected one nearer to input_scale"),
        (lambda v: v[KEY][QKV].update(offset=500), "offset is 500, expected -128 to 127"),
        (lambda v: v[KEY][QKV].update(offset=True), "offset is True, expected -128 to 127"),
        (lambda v: v[KEY][QKV].update(offset=-128), ", expected -128 as ms_quant.json: "),
        (lambda v: v.pop("record"), "record is None, expected what was computed"),
        (lambda v: v["record"].update(algorithm="x"), "algorithm is 'x', expected one of minmax"),
        (lambda v: v["record"].update(algorithm=[]), "algorithm is [], expected one of minmax"),
        (lambda v: v["record"].update(scheme="W8A8_DYNAMIC"), "scheme is 'W8A8_DYNAMIC', expected"),
        (lambda v: v["record"].update(dtype="float16"), "dtype is 'float16', expected 'bfloat16'"),
    ],
)
def test_defects_of_the_record(change: Callable, message: str, checkpoint: Path) -> None:
    edit_record(checkpoint, change)
    problems = verify_checkpoint(checkpoint).problems
    assert any(RECORD in found and message in found for found in problems), problems


@pytest.mark.parametrize("name", ["model-extra.safetensors", "block-00000.safetensors", "rank_0/x"])
def test_a_file_too_many(name: str, checkpoint: Path) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_bytes(b"x")
    assert problem(checkpoint) == (
        f"{checkpoint / name}: not listed in {RECORD}, expected no other file that a runtime reads"
    )


@pytest.mark.parametrize("listed", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_what_hubs_add_is_a_note(listed: str, checkpoint: Path, source: Path) -> None:
    for name in ("README.md", ".gitattributes", "configuration.json", "LICENSE", ".cache/x.lock"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("{}")
    found = verify_checkpoint(checkpoint, source)
    (note,) = found.notes
    assert found.problems == () and "configuration.json are not listed in" in note
    (checkpoint / listed).write_text("{ }")
    assert any(
        f"{checkpoint / listed}: " in text for text in verify_checkpoint(checkpoint).problems
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5000.0, "rope_parameters": None},
        {"rms_norm_eps": 1e-5},
        {"max_position_embeddings": 65},
        {"eos_token_id": None},
        {"added": 1},
    ],
)
def test_config_json_that_is_not_the_sources(changes: dict, checkpoint: Path, source: Path) -> None:
    edit_json(checkpoint / "config.json", **changes)
    assert verify_checkpoint(checkpoint).problems == ()
    key = next(iter(changes))
    assert f"config.json: {key} is {changes[key]!r}, expected" in problem(checkpoint, source)


def test_tokenizer_that_is_not_the_sources(checkpoint: Path, source: Path) -> None:
    edit_json(checkpoint / "tokenizer_config.json", eos_token="the")
    path = checkpoint / "tokenizer_config.json"
    assert problem(checkpoint, source) == f"{path}: differs from the source's"
    (source / "tokenizer_config.json").unlink()
    assert problem(checkpoint, source) == f"{path}: expected no such file, the source has none"
    (source / "merges.txt").write_text("a b")
    problems = verify_checkpoint(checkpoint, source).problems
    missing = f"{checkpoint / 'merges.txt'}: no such file, expected a copy of the source's"
    assert missing in problems


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch_dtype": None}, "torch_dtype is None, expected 'bfloat16'"),
        ({"rope_theta": None}, "rope_theta is None, expected 10000.0 as rope_parameters says"),
    ],
)
def test_keys_that_older_runtimes_do_not_find(
    changes: dict, message: str, checkpoint: Path
) -> None:
    edit_json(checkpoint / "config.json", **changes)
    assert message in problem(checkpoint)


@pytest.mark.parametrize("changes", [{"torch_dtype": "float16"}, {"rope_theta": 5000.0}])
def test_spellings_that_contradict_each_other(changes: dict, checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", **changes)
    with pytest.raises(MsQuantError, match="expected one value: some runtimes read the first"):
        verify_checkpoint(checkpoint)


def test_a_checkpoint_of_before_that_has_the_old_spelling(checkpoint: Path, source: Path) -> None:
    edit_json(checkpoint / "config.json", rope_parameters=None, dtype=None)
    assert verify_checkpoint(checkpoint, source).problems == ()


def test_an_empty_text_config(checkpoint: Path, source: Path) -> None:
    edit_json(checkpoint / "config.json", text_config={})
    assert verify_checkpoint(checkpoint).problems == ()
    assert "text_config is" in problem(checkpoint, source)


@pytest.mark.parametrize("value", [5, "x", [1], {"hidden_size": 8}])
def test_a_text_config_that_some_runtime_may_take(value: object, checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", text_config=value)
    with pytest.raises(MsQuantError, match=r"text_config is .*, expected no such key"):
        verify_checkpoint(checkpoint)


def test_a_float_tensor_labelled_as_quantized(checkpoint: Path) -> None:
    edit_json(checkpoint / DESCRIPTION, **{"lm_head.weight": "W8A8"})
    assert "lm_head.weight is 'W8A8', expected 'FLOAT'" in problem(checkpoint)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (f"{Q}.weight", np.zeros((24, 8), "i1"), "is int8 [24, 8], expected int8 [24, 16]"),
        (f"{Q}.weight", np.zeros((24, 16), "f4"), "is float32 [24, 16], expected int8 [24, 16]"),
        (f"{Q}.deq_scale", np.ones(3, "f4"), "is float32 [3], expected float32 [24]"),
        (f"{Q}.input_offset", np.zeros(0, "i1"), "is int8 [0], expected int8 [16]"),
        ("model.norm.weight", np.ones(3, "f4"), "is float32 [3], expected bfloat16 [16]"),
        ("model.embed_tokens.weight", np.ones((3, 16), "f4"), "expected bfloat16 [320, 16]"),
    ],
)
def test_evaluation_refuses_a_wrong_structure(
    name: str, array: np.ndarray, message: str, checkpoint: Path, edit: Callable
) -> None:
    edit(lambda tensors: tensors.update({name: array}))
    with pytest.raises(MsQuantError) as caught:
        QuantizedModel(checkpoint)
    assert f"tensor '{name}' " in str(caught.value) and message in str(caught.value)


def test_no_float_tensor_is_in_memory_as_a_whole(
    checkpoint: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, whole = SafetensorsFile.read, set()

    def record(self: SafetensorsFile, name: str) -> np.ndarray:
        whole.add(name)
        return read(self, name)

    monkeypatch.setattr(SafetensorsFile, "read", record)
    assert verify_checkpoint(checkpoint, source).problems == ()
    assert {name.rpartition(".")[2] for name in whole} == {"weight", "quant_bias", "input_offset"}
    assert not any("embed" in name or "norm" in name or "head" in name for name in whole)


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
