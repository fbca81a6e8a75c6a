"""`ms-quant verify` of ascend checkpoints: one test for each defect, hashes made right again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sealed import seal_again

from ms_quant.files.atomic import write_json
from ms_quant.files.sealed import seal
from ms_quant.job.output_directory import RECORD
from ms_quant.numerics.grid import AffineFormat
from ms_quant.pipeline.run import QuantizeOptions, run_job
from ms_quant.schemes.table import SCHEMES
from ms_quant.verify.checkpoint import verify_checkpoint
from ms_quant.verify.requantize_grid import GridComparison
from ms_quant.verify.source import max_output_error

pytestmark = pytest.mark.usefixtures("blocking_mindspore")

Tensors = dict[str, np.ndarray]
SHARD = "quant_model_weights-00001-of-00001.safetensors"
INDEX, DESCRIPTION = "quant_model_weights.safetensors.index.json", "quant_model_description.json"
Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
GATE, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "down"))
NORM = "model.layers.0.input_layernorm.weight"
STATIC = {"samples": 2, "seq_len": 16}


@pytest.fixture
def source(tiny_model: Callable[..., Path]) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return tiny_model(family="qwen2", layers=1, **shape)


@pytest.fixture
def make(source: Path, tmp_path: Path, calib_text: Path) -> Callable[..., Path]:
    def run(scheme: str, options: dict | None = None, **changes: Any) -> Path:
        if "samples" in changes:
            changes["calib"] = calib_text
        request = QuantizeOptions(
            source,
            tmp_path / "out",
            scheme,
            **{"scheme_options": options or {}, **changes},
        )
        run_job(request)
        return tmp_path / "out"

    return run


@pytest.fixture
def edit(load_tensors: Callable, save_tensors: Callable) -> Callable:
    """Changes tensors of a checkpoint; index and record follow."""

    def run(directory: Path, change: Callable[[Tensors], object]) -> None:
        tensors = load_tensors(directory)
        change(tensors)
        save_tensors(directory / SHARD, tensors)
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, SHARD)}
        (directory / INDEX).write_text(json.dumps(index))
        seal_again(directory)

    return run


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    seal_again(path.parent)


def problem(directory: Path, source: Path | None = None) -> str:
    problems = verify_checkpoint(directory, source).problems
    assert len(problems) == 1, problems
    return problems[0]


def put(name: str, value: Any, index: Any = 0) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].reshape(-1)[index] = value

    return change


def test_a_flipped_byte(make: Callable[..., Path]) -> None:
    path = make("W8A16") / SHARD
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert problem(path.parent).startswith(f"{path}: sha256 differs")


@pytest.mark.parametrize(
    ("scheme", "options", "change", "message"),
    [
        ("W8A16", {}, put(f"{Q}.weight_scale", -1), "weight_scale: 1 scales are not positive"),
        ("W8A16", {}, put(f"{Q}.weight_scale", np.nan), "weight_scale' holds 1 NaN or infinite"),
        ("W8A16", {}, put(f"{Q}.weight_offset", 1), "offset: 1 of 64 offsets are not 0, the wei"),
        (
            "W8A16",
            {"symmetric": False},
            put(f"{Q}.weight_offset", 0.5),
            "weight_offset: 1 of 64 offsets are not whole numbers of -127 to 128",
        ),
        ("W4A4_DYNAMIC", {}, put(f"{Q}.weight", 8), "weight: 1 of 4096 values are not int4, exp"),
        ("W4A8_DYNAMIC", {}, put(f"{DOWN}.scale_bias", 7), "scale_bias: 1 of 1024 values differ"),
        ("W4A8_DYNAMIC", {}, put(f"{DOWN}.weight", 1), "down_proj.scale_bias: 2 of 1024 values d"),
        (
            "W4A8_DYNAMIC",
            {"group_size": 32},
            put(f"{Q}.weight_scale_second", 0),
            "weight_scale_second: 1 scales are not positive",
        ),
        ("W8A8_MXFP8", {}, put(f"{Q}.weight_scale", 255), "weight_scale: 1 of 128 exponents are"),
        ("W8A8_MXFP8", {}, put(f"{Q}.weight", np.nan), "q_proj.weight: 1 of 4096 values are NaN"),
    ],
)
def test_values(
    scheme: str, options: dict, change: Callable, message: str, make: Callable, edit: Callable
) -> None:
    directory = make(scheme, options)
    edit(directory, change)
    assert any(message in found for found in verify_checkpoint(directory).problems)


@pytest.mark.parametrize(
    ("dtype", "change", "message"),
    [
        ("bfloat16", put(f"{Q}.quant_bias", 7), "q_proj.quant_bias: 1 of 64 values differ from"),
        ("bfloat16", put(f"{Q}.deq_scale", 7), "q_proj.deq_scale: 1 of 64 values differ from"),
        ("float16", put(f"{Q}.deq_scale", 1 << 40), "deq_scale: 1 of 64 values exceed 32 bits"),
        ("bfloat16", put(f"{Q}.bias", 7), "q_proj.quant_bias: 1 of 64 values differ from what"),
        ("bfloat16", put(f"{K}.input_offset", 0.5), "zero points are not whole numbers of -128"),
        ("bfloat16", put(f"{K}.input_scale", 0), "k_proj.input_scale: 1 scales are not positive"),
    ],
)
def test_values_of_a_static_linear(
    dtype: str, change: Callable, message: str, make: Callable, edit: Callable
) -> None:
    directory = make("W8A8_MIX", dtype=dtype, **STATIC)
    edit(directory, change)
    assert message in problem(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(f"{K}.kv_cache_scale", -1), "k_proj.kv_cache_scale: 1 of 32 scales are not positive"),
        (put(f"{V}.kv_cache_offset", 3), "v_proj.kv_cache_offset: 1 of 32 offsets are not 0, run"),
        (lambda t: t.pop(f"{V}.kv_cache_offset"), "kv_cache_offset' is missing, expected float32"),
    ],
)
def test_values_of_a_cache(change: Callable, message: str, make: Callable, edit: Callable) -> None:
    directory = make("W8A16", kv_cache="C8", **STATIC)
    edit(directory, change)
    assert any(message in found for found in verify_checkpoint(directory).problems)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache_type": "", "kv_quant_type": ""}, "unknown tensor 'model.layers.0.self_attn.k_"),
        ({"kv_quant_type": ""}, "kv_quant_type is '', expected 'C8'"),
        ({f"{K}.kv_cache_scale": "FLOAT"}, "kv_cache_scale is 'FLOAT', expected 'C8'"),
    ],
)
def test_the_description_of_a_cache(changes: dict, message: str, make: Callable) -> None:
    directory = make("W8A16", kv_cache="C8", **STATIC)
    edit_json(directory / DESCRIPTION, **changes)
    assert any(message in found for found in verify_checkpoint(directory).problems)


def test_fused_linears_share_their_input(make: Callable, edit: Callable) -> None:
    def change(tensors: Tensors) -> None:
        for suffix in ("input_scale", "deq_scale"):
            tensors[f"{K}.{suffix}"] *= np.float32(2)

    directory = make("W8A8", formats=("ascend",), **STATIC)
    edit(directory, lambda tensors: (change(tensors), tensors[f"{K}.bias"].__imul__(np.float32(2))))
    assert "k_proj.input_scale: differs from that of" in problem(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.weight_scale"), "q_proj.weight_scale' is missing, expected float32"),
        (lambda t: t.update({f"{Q}.x": np.ones(1, "f4")}), "unknown tensor 'model.layers.0.self_a"),
        (
            lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:1]}),
            "is int8 [1, 64], expected int8 [64, 64]",
        ),
    ],
)
def test_structure(change: Callable, message: str, make: Callable, edit: Callable) -> None:
    directory = make("W8A16")
    edit(directory, change)
    assert message in problem(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{Q}.bias": "W8A16"}, "q_proj.bias is 'W8A16', expected 'FLOAT'"),
        ({f"{Q}.weight_scale": "FLOAT"}, "tensors of model.layers.0.self_attn.q_proj are W8A16 an"),
        ({"group_size": 32}, "group_size is 32, expected 0"),
        ({"group_size": 7}, "group_size is 7, expected 0"),
        (
            {f"{K}.kv_cache_scale": "C8"},
            "names 'model.layers.0.self_attn.k_proj.kv_cache_scale', ex",
        ),
        ({"kv_cache_type": "C9"}, "kv_cache_type is 'C9', expected 'C8'"),
        ({"version": "2"}, "version is '2', expected '1.0.0'"),
        ({"model_quant_type": "FLOAT"}, "model_quant_type is 'FLOAT', expected 'W8A16'"),
        ({"model.norm.weight": "W8A16"}, "model.norm.weight is 'W8A16', expected 'FLOAT'"),
        ({"x.weight": "FLOAT"}, "names 'x.weight', expected only the model's tensors"),
    ],
)
def test_description(changes: dict, message: str, make: Callable) -> None:
    directory = make("W8A16")
    edit_json(directory / DESCRIPTION, **changes)
    assert any(message in found for found in verify_checkpoint(directory).problems)


def test_the_record_states_the_options(make: Callable[..., Path]) -> None:
    directory = make("W8A16")
    value = json.loads((directory / RECORD).read_text())
    value["record"]["scheme_options"]["group_size"] = 64
    write_json(directory / RECORD, value)
    seal_again(directory)
    assert "scheme_options is {'group_size': 64, 'symmetric': True}, expected" in problem(directory)


@pytest.mark.parametrize(
    ("scheme", "options", "changes", "name"),
    [
        ("W8A16", {}, {}, f"{V}.weight"),
        ("W8A16", {"symmetric": False}, {}, f"{V}.weight"),
        ("W4A4_DYNAMIC", {}, {"algorithm": "clip", **STATIC}, f"{V}.weight"),
        ("W8A8_MXFP8", {}, {}, f"{V}.weight"),
        ("W4A4_MXFP4", {}, {}, f"{V}.weight"),
        ("W8A8FP8_DYNAMIC", {}, {"algorithm": "smoothquant", **STATIC}, f"{Q}.weight"),
        (
            "W8A8_MIX",
            {},
            {"algorithm": "smoothquant", **STATIC},
            f"{GATE}.weight",
        ),
    ],
)
def test_one_changed_code_is_found_with_the_source(
    scheme: str,
    options: dict,
    changes: dict,
    name: str,
    make: Callable,
    edit: Callable,
    source: Path,
) -> None:
    def change(tensors: Tensors) -> None:
        codes = tensors[name].view(np.uint8)
        codes[3, 5] ^= 1
        path = name.removesuffix(".weight")
        if scheme == "W8A8_MIX":  # what follows from the code, as a forger would
            step = int(codes.view(np.int8)[3, 5]) - int((codes[3, 5] ^ 1).astype(np.int8))
            offset = int(tensors[f"{path}.input_offset"][0])
            tensors[f"{path}.quant_bias"][3] -= offset * step

    directory = make(scheme, options, **changes)
    assert verify_checkpoint(directory, source).problems == ()
    edit(directory, change)
    assert verify_checkpoint(directory).problems == ()
    assert problem(directory, source).startswith(f"{name}: 1 of ")


def test_a_scale_that_is_not_the_sources(make: Callable, edit: Callable, source: Path) -> None:
    directory = make("W4A4_DYNAMIC")
    edit(directory, put(f"{Q}.weight_scale", 3))
    found = verify_checkpoint(directory, source).problems[0]
    assert found.startswith(f"{Q}.weight_scale: parameters of 1 of 64 rows do not follow")


def test_another_weight_is_found_where_codes_are_placed(
    make: Callable, edit: Callable, source: Path
) -> None:
    directory = make("W4A4_DYNAMIC", algorithm="gptq", **STATIC)
    result = verify_checkpoint(directory, source)
    assert (result.problems, result.made_again, result.measured) == ((), 0, 7)
    edit(directory, lambda tensors: tensors.update({f"{V}.weight": tensors[f"{V}.weight"][::-1]}))
    assert "v_proj: relative output error 1." in problem(directory, source)


@pytest.mark.parametrize(
    ("scheme", "format"), [("W8A8_DYNAMIC", "golden-stick"), ("W8A8", "ascend")]
)
def test_smoothing_that_was_folded(
    scheme: str, format: str, make: Callable, source: Path, load_tensors: Callable
) -> None:
    """Of seven linears three can be made again, two (v and up) measured, two are fed by those."""
    choices = {"formats": (format,)}
    directory = make(scheme, algorithm="smoothquant", **choices, **STATIC)
    assert not np.array_equal(load_tensors(directory)[NORM], load_tensors(source)[NORM])
    result = verify_checkpoint(directory, source)
    assert result.problems == ()
    assert [row.made_again for row in result.layers] == [True, True, False, True, False]
    assert result.unknown == (
        "model.layers.0.self_attn.o_proj",
        DOWN,
    )


@pytest.mark.parametrize("name", [NORM, f"{V}.bias"])
def test_a_folded_tensor_of_another_sign(
    name: str, make: Callable, edit: Callable, source: Path
) -> None:
    def change(tensors: Tensors) -> None:
        tensors[name][0] *= -1

    directory = make("W8A8FP8_DYNAMIC", algorithm="smoothquant", **STATIC)
    edit(directory, change)
    problems = verify_checkpoint(directory, source).problems
    assert f"{name}: 1 of " in problems[0] and "no positive finite multiples" in problems[0]


def test_bounds_of_the_output_error() -> None:
    limits = {name: max_output_error(scheme) for name, scheme in SCHEMES.items()}
    assert limits["W8A8"] == limits["W8A8_MXFP8"] == 0.1
    assert limits["W4A16"] == limits["W4A8_MXFP"] == limits["W8A8S"] == 0.35
    assert limits["W4A4_MXFP4_DUALSCALE"] == limits["W4A4_DYNAMIC"] == 0.5


def test_nothing_differs_in_no_rows() -> None:
    comparison = GridComparison(AffineFormat(4, 32), np.dtype(np.float32), False)
    assert list(comparison.problems("x", (0, 32))) == []


@pytest.mark.parametrize("size", [256, 32.0, True, "32", None])
def test_another_group_size(make: Callable, size: Any) -> None:
    directory = make("W4A8_DYNAMIC", {"group_size": 32})
    edit_json(directory / DESCRIPTION, group_size=size)
    assert f"group_size is {size!r}, expected 32" in problem(directory)


@pytest.mark.parametrize(
    ("groups", "found"),
    [(3, "expected float32 [64, 1]"), (16, "group_size is 4, expected one of 0, 32")],
)
def test_scales_of_groups_that_cannot_be(
    groups: int, found: str, make: Callable, edit: Callable
) -> None:
    directory = make("W8A16")
    edit(directory, lambda t: t.update({f"{Q}.weight_scale": np.ones((64, groups), "f4")}))
    assert any(found in text for text in verify_checkpoint(directory).problems)


def test_scalar_tensors_with_telling_names(make: Callable, edit: Callable) -> None:
    directory = make("W8A16")
    edit(directory, lambda t: t.update({"x.svd_lowrank_l1": np.float32(1)}))
    assert "unknown tensor 'x.svd_lowrank_l1'" in problem(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "osl"}, "algorithm 'osl' does not work with scheme W8A16"),
        ({"algorithm": "gptq+gptq"}, "gptq and gptq both decide the rounding"),
        ({"algorithm": "flatquant"}, "its tensors have no place for it"),
        ({"algorithm": ["gptq"]}, "algorithm is ['gptq'], expected one of minmax"),
        ({"algorithm_options": {"gptq": 1}}, "algorithm_options is {'gptq': 1}, expected options"),
        ({"algorithm_options": {"gptq": {"damping": 1}}}, "takes no option 'gptq.damping'"),
    ],
)
def test_a_recorded_algorithm_that_cannot_be(make: Callable, changes: dict, message: str) -> None:
    directory = make("W8A16")
    value = json.loads((directory / RECORD).read_text())
    value["record"] |= changes
    write_json(directory / RECORD, seal({k: v for k, v in value.items() if k != "sha256"}))
    assert message in problem(directory)


def test_a_channel_that_needs_no_smoothing_in_a_float32_model(
    tiny_model: Callable[..., Path], tmp_path: Path, calib_text: Path
) -> None:
    """Its gain is rounded all the same, and the columns make up for that."""

    def change(tensors: Tensors) -> None:
        for path in (Q, K, V):
            tensors[f"{path}.weight"][0, 5] = 1
        tensors[NORM][5] = np.float32(1.00123)

    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    source = tiny_model(layers=1, dtype="float32", change=change, **shape)
    request = QuantizeOptions(
        source,
        tmp_path / "out",
        "W8A8_DYNAMIC",
        "smoothquant",
        algorithm_options={"alpha": 0.0},
        formats=("ascend",),
        calib=calib_text,
        **STATIC,
    )
    run_job(request)
    result = verify_checkpoint(tmp_path / "out", source)
    assert result.problems == () and result.made_again == 3
