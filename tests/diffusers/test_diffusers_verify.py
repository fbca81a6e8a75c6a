"""verify, inspect and serve-check of directories for vllm-omni; the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusion_models import (
    load_tensors,
    save_pipeline,
    save_tensors,
    save_transformer,
)

import ms_quant
from ms_quant.diffusers.inspection import inspect_directory
from ms_quant.diffusers.methods import HELD
from ms_quant.diffusers.serving import serve_check_directory
from ms_quant.diffusers.verify import verify_directory
from ms_quant.errors import MsQuantError
from ms_quant.serve.check import serve_check

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipes") / "wan", transformer="wan")


def make(model: Path, output: Path, scheme: str = "W8A8_MXFP8", **options: Any) -> Path:
    ms_quant.quantize_pipeline(model, output, scheme, **options)
    return output


def as_made_by_others(directory: Path) -> Path:
    """Without our record, which would tell of every changed byte."""
    (directory / "ms_quant.json").unlink()
    return directory


def change(directory: Path, name: str, edit: Callable[[np.ndarray], Any] | None) -> None:
    tensors = {key: array.copy() for key, array in load_tensors(directory).items()}
    if edit is None:
        del tensors[name]
    else:
        made = edit(tensors[name])
        tensors[name] = tensors[name] if made is None else made
    save_tensors(directory / WEIGHTS, tensors)


def set_code(value: int) -> Callable[[np.ndarray], None]:
    def edit(array: np.ndarray) -> None:
        array.view(np.uint8)[2, 3] = value

    return edit


@pytest.mark.parametrize("scheme", [name for name in HELD if "DUAL" not in name])
def test_every_scheme_is_made_again_bit_for_bit(scheme: str, pipe: Path, tmp_path: Path) -> None:
    made = make(pipe, tmp_path / "out", scheme, exclude=("*.attn2.to_k",))
    found = verify_directory(made, pipe)
    assert (found.verdict, found.problems) == ("right", ())
    assert found.quantized == found.made_again == 18 and found.left_float == 2
    worst = max(layer.output_error for layer in found.layers)
    assert 0 < worst < (0.02 if "W4" in scheme else 0.003)  # of uniform numbers, as others measure


def test_a_changed_byte_is_seen(pipe: Path, tmp_path: Path) -> None:
    made = make(pipe, tmp_path / "out")
    (made / "vae" / WEIGHTS).write_bytes(b"\x02" * 2999 + b"\x03")
    (problem,) = verify_directory(made).problems
    assert problem.endswith(
        f"vae/{WEIGHTS}: sha256 differs from ms_quant.json, the file was changed"
    )
    (made / "transformer" / "more.safetensors").write_bytes(b"")
    assert any("more.safetensors: not listed" in text for text in verify_directory(made).problems)


def test_another_source_is_seen(pipe: Path, tmp_path: Path) -> None:
    made = make(pipe, tmp_path / "out")
    other = save_pipeline(tmp_path / "other", transformer="wan")
    change(other / "transformer", "blocks.1.ffn.net.2.weight", lambda w: w.__setitem__((5, 6), 1.5))
    change(other / "transformer", "proj_out.bias", lambda b: b.__setitem__(0, 7))
    (other / "LICENSE.md").write_text("do not")
    found = verify_directory(made, other)
    assert found.made_again == 19
    assert sorted(text.partition(" ")[0].rpartition("/")[2] for text in found.problems) == [
        *("LICENSE.md:", "blocks.1.ffn.net.2.weight:", "blocks.1.ffn.net.2.weight_scale:"),
        "proj_out.bias:",
    ]


@pytest.mark.parametrize(
    ("scheme", "name", "edit", "sentence"),
    [
        ("W8A8_MXFP8", "blocks.0.ffn.net.2.weight", set_code(0x7F), "values are NaN"),
        ("W4A4_MXFP4", "blocks.0.ffn.net.2.weight", set_code(0x49), "none of float4 e2m1"),
        ("W8A8_MXFP8", "blocks.0.ffn.net.2.weight_scale", set_code(255), "exponents are NaN"),
        ("W4A4_DYNAMIC", "blocks.0.ffn.net.2.weight", set_code(8), "values are not int4"),
        (
            "W8A8_DYNAMIC",
            "blocks.0.ffn.net.2.weight_scale",
            lambda scale: scale.__setitem__((1, 0), 0),
            "1 scales are not positive",
        ),
        ("W8A8_MXFP8", "blocks.0.ffn.net.2.weight", lambda w: w.astype(np.float32), "expected flo"),
        (
            "W8A8_MXFP8",
            "blocks.0.norm2.bias",
            lambda b: b.__setitem__(0, np.inf),
            "NaN or inf",
        ),
        ("W8A8_MXFP8", "blocks.1.attn1.to_v.weight_scale", None, "the runtime fuses them"),
        ("W8A8_DYNAMIC", "blocks.1.attn1.to_v.weight_offset", None, "has no tensor"),
        ("W8A8_MXFP8", "scale_shift_table", None, "has no tensor 'scale_shift_table.weight'"),
    ],
)
def test_what_others_made_is_checked_tensor_by_tensor(
    scheme: str, name: str, edit: Any, sentence: str, pipe: Path, tmp_path: Path
) -> None:
    made = as_made_by_others(make(pipe, tmp_path / "out", scheme))
    assert verify_directory(made).verdict == "right as far as can be seen"
    change(made / "transformer", name, edit)
    assert any(sentence in text for text in verify_directory(made).problems)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"ignored_layers": []}, "does not name blocks.0.attn1.to_qkv, which is float"),
        ({"ignored_layers": "proj_out"}, "ignored_layers is 'proj_out', expected names"),
        ({"is_checkpoint_mxfp8_serialized": False}, "would quantize the codes again"),
        ({"quant_method": "mxfp4"}, "is_checkpoint_mxfp4_serialized is None, expected true"),
        ({"add": "blocks.1.ffn.net_2"}, "names blocks.1.ffn.net_2, which is quantized"),
    ],
)
def test_config_and_tensors_agree(
    entry: dict[str, Any], sentence: str, pipe: Path, tmp_path: Path
) -> None:
    made = as_made_by_others(make(pipe, tmp_path / "out", exclude=("blocks.0.attn1.to_q",)))
    path = made / "transformer" / "config.json"
    config = json.loads(path.read_text())
    if "add" in entry:
        config["quantization_config"]["ignored_layers"].append(entry["add"])
    else:
        config["quantization_config"] |= entry
    path.write_text(json.dumps(config))
    found = serve_check_directory(made, "vllm-omni")
    assert any(sentence in text for text in found["problems"]) and not found["line"]


def test_the_fused_name_alone_is_enough(pipe: Path, tmp_path: Path) -> None:
    """As vllm-omni's own merge tool writes it."""
    made = as_made_by_others(make(pipe, tmp_path / "out", exclude=("blocks.0.attn1.to_q",)))
    path = made / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignored_layers"] = ["blocks.0.attn1.to_qkv"]
    path.write_text(json.dumps(config))
    assert not verify_directory(made).problems


def test_serving_prints_the_command(pipe: Path, tmp_path: Path) -> None:
    made = make(pipe, tmp_path / "out")
    found = serve_check_directory(made, "vllm-omni")
    assert found["problems"] == [] and found["command"] == ["vllm", "serve", str(made), "--omni"]
    rows = {row["kind"]: (row["method"], row["weight"], row["layers"]) for row in found["loaded"]}
    assert rows["transformer: attn1.to_qkv"] == ("mxfp8", "192 x 64", 2)
    assert rows["transformer: ffn.net_2"] == ("mxfp8", "64 x 128", 2)


def test_serving_says_what_would_fail(pipe: Path, tmp_path: Path) -> None:
    def problems(directory: Path, **how: Any) -> str:
        return "\n".join(serve_check_directory(directory, "vllm-omni", **how)["problems"])

    made = make(pipe, tmp_path / "mxfp8")
    assert "tp is 2, expected 1: vllm-omni 0.30 does not divide" in problems(made, tp=2)
    assert "mxfp8 on 910b: expected Ascend 950" in problems(made, device="910b")
    four = make(pipe, tmp_path / "mxfp4", "W4A4_MXFP4")
    assert problems(four, tp=2) == ""
    assert "64 inputs over 4 ranks, expected a multiple of 32" in problems(four, tp=4)
    dynamic = make(pipe, tmp_path / "int8", "W8A8_DYNAMIC")
    assert problems(dynamic, device="910b", tp=2) == ""
    alone = make(save_transformer(tmp_path / "m", "wan"), tmp_path / "alone")
    assert "is a transformer alone, expected the directory of a pipeline" in problems(alone)
    video = save_pipeline(tmp_path / "cog", transformer="cogvideox")
    assert "no network of its own" in problems(make(video, tmp_path / "video"))
    with pytest.raises(MsQuantError, match="a float model, expected a quantized one"):
        problems(pipe)
    with pytest.raises(MsQuantError, match="runtime is 'mindie', expected vllm-omni"):
        serve_check_directory(made, "mindie")
    with pytest.raises(MsQuantError, match="is no directory of diffusers"):
        serve_check(tmp_path, "vllm-omni")


def test_two_methods_are_refused(tmp_path: Path) -> None:
    pair = save_pipeline(tmp_path / "pair", transformer="wan", transformer_2="wan")
    made = as_made_by_others(make(pair, tmp_path / "out"))
    other = make(pair, tmp_path / "other", "W4A4_MXFP4")
    for path in (other / "transformer_2").iterdir():
        (made / "transformer_2" / path.name).write_bytes(path.read_bytes())
    assert any("mxfp4 and mxfp8, expected one" in x for x in verify_directory(made).problems)


def test_inspecting_float_and_quantized(pipe: Path, tmp_path: Path) -> None:
    rows = {row["name"]: row for row in inspect_directory(pipe)["linears"]}
    assert rows["blocks.0.attn1.to_q"] == {
        "name": "blocks.0.attn1.to_q",
        "stored_as": "F32",
        "shape": [64, 64],
    }
    found = inspect_directory(make(pipe, tmp_path / "out", "W4A4_MXFP4"))
    assert (found["format"], found["method"]) == ("vllm-omni", "mxfp4")
    assert found["linears"][0]["stored_as"] == "F8_E4M3, values of float4 e2m1"


def test_the_commands(pipe: Path, tmp_path: Path, ms_quant_command: Any) -> None:
    out = tmp_path / "out"
    planned = ms_quant_command("quantize", pipe, "-o", out, "--dry-run", "--json")
    assert json.loads(planned.stdout)["quantized_linears"] == 20 and not out.exists()
    run = ms_quant_command("quantize", pipe, "-o", out, "--format", "vllm-omni", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["method"] == "mxfp8"
    run = ms_quant_command("verify", out, "--source", pipe)
    assert "20 linears compared with the source, 20 bit for bit" in run.stdout
    run = ms_quant_command("serve-check", out, "--runtime", "vllm-omni")
    assert run.stdout.endswith(f"vllm serve {out} --omni\n")
    for arguments, sentence in {
        ("--calib", __file__): "is quantized from its weights alone",
        ("--algorithm", "gptq"): "--algorithm gptq: a directory of diffusers",
        ("--format", "ascend"): "--format is 'ascend', expected vllm-omni",
    }.items():
        run = ms_quant_command("quantize", pipe, "-o", tmp_path / "no", *arguments)
        assert run.returncode and sentence in run.stderr, run.stderr
    run = ms_quant_command("eval", out, "--text", __file__)
    assert "is a pipeline of diffusers, which quantize, verify" in run.stderr
