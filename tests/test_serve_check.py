"""ms-quant serve-check of checkpoints that are not split over ranks, by each runtime's rules."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_quant.errors import MsQuantError
from ms_quant.job.output_directory import RECORD
from ms_quant.pipeline.request import QuantizeOptions
from ms_quant.pipeline.run import run_job
from ms_quant.serve.check import serve_check

Command = Callable[..., subprocess.CompletedProcess[str]]
Make = Callable[..., Path]


@pytest.fixture
def make(
    tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path, blocking_mindspore: None
) -> Make:
    """A quantized tiny model, without the record that would tell every change."""

    count = itertools.count()

    def one(
        scheme: str = "W8A8",
        format: str = "",
        dtype: str = "bfloat16",
        algorithm: str = "minmax",
        **model: Any,
    ) -> Path:
        name = f"{scheme}-{format}-{dtype}-{next(count)}"
        source = tiny_model(f"source-{name}", layers=1, dtype=dtype, **model)
        calibration = {"calib": calib_text, "samples": 2, "seq_len": 16}
        options = QuantizeOptions(
            source,
            tmp_path / name,
            scheme=scheme,
            algorithm=algorithm,
            formats=(format,) if format else (),
            **(calibration if scheme == "W8A8" or algorithm != "minmax" else {}),
        )
        run_job(options)
        (options.output / RECORD).unlink()
        return options.output

    return one


def problems(directory: Path, runtime: str = "vllm-mindspore", tp: int = 1, **more: str) -> str:
    found = serve_check(directory, runtime, tp, **more)
    assert not found["problems"] or not found["line"]
    return "\n".join(found["problems"])


def edit(directory: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_what_is_loaded_how(make: Make) -> None:
    found = serve_check(make(dtype="float16"), "vllm-mindspore", 2)
    assert found["problems"] == []
    rows = {row["kind"]: row for row in found["loaded"]}
    assert rows["qkv_proj"]["weight"] == "24 x 16"
    assert rows["qkv_proj"]["method"] == "W8A8"
    assert rows["down_proj"]["weight"] == "16 x 12"
    assert rows["embed_tokens"]["weight"] == "float16 160 x 16"
    assert rows["norm"]["weight"] == "float16 16"
    assert {row["ranks"] for row in found["loaded"]} == {"each of 2"}
    assert found["line"] == (
        f"VLLM_MS_MODEL_BACKEND=Native vllm-mindspore serve {found['checkpoint']} "
        "--quantization golden-stick --tensor-parallel-size 2"
    )


def test_on_a_310p(make: Make) -> None:
    """What the documentation of the runtime asks for there, and what float16 does."""
    directory = make()
    found = serve_check(directory, "vllm-mindspore", 1, "310p")
    assert found["environment"] == {
        "VLLM_MS_MODEL_BACKEND": "Native",
        "MS_ENABLE_LCCL": "off",
        "HCCL_OP_EXPANSION_MODE": "AI_CPU",
        "MS_ENABLE_INTERNAL_BOOST": "off",
        "MS_ALLOC_CONF": "enable_vmm:true",
    }
    assert "--dtype float16" in found["line"]
    scale = "model.layers.0.mlp.down_proj.deq_scale"
    edit(directory, lambda tensors: tensors[scale].__imul__(np.float32(1e-9)))
    assert problems(directory) == ""
    assert f"{scale}: 16 of 16 values become 0 in float16" in problems(directory, device="310p")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda t: t.update(odd=np.zeros(1, np.int8)), "unknown tensor 'odd', expected only"),
        (
            lambda t: t["model.layers.0.self_attn.k_proj.input_scale"].__imul__(2),
            "k_proj.input_scale differs from model.layers.0.self_attn.q_proj.input_scale",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.input_scale": np.ones(1, np.float16)}),
            "is float16 [1], expected float16 [16]",
        ),
    ],
)
def test_tensors_that_vllm_mindspore_would_load_wrongly(
    make: Make, change: Callable[[dict[str, np.ndarray]], Any], pattern: str
) -> None:
    directory = make(dtype="float16")
    edit(directory, change)
    assert pattern in problems(directory)


def test_a_missing_tensor(make: Make) -> None:
    directory = make(dtype="float16")
    edit(directory, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(MsQuantError, match=r"has no tensor 'model.norm.weight', expected it as"):
        problems(directory)
    (directory / "model.safetensors.index.json").unlink()
    assert "tensor 'model.norm.weight' is missing" in problems(directory)


@pytest.mark.parametrize(
    ("name", "change", "pattern"),
    [
        ("config.json", lambda v: v.pop("architectures"), "architectures is None, expected"),
        ("config.json", lambda v: v.update(compression_config={}), "has compression_config"),
        (
            "quantization_description.json",
            lambda v: v.update({"model.layers.0.mlp.up_proj.weight": "FLOAT"}),
            "expected one",
        ),
    ],
)
def test_files_that_vllm_mindspore_would_read_wrongly(
    make: Make, name: str, change: Callable[[dict[str, Any]], Any], pattern: str
) -> None:
    directory = make(dtype="float16")
    edit_json(directory / name, change)
    assert pattern in problems(directory)


def test_a_config_that_only_transformers_5_reads(make: Make) -> None:
    directory = make(dtype="float16")
    keys = "rope_theta, rope_scaling, torch_dtype of config.json"
    assert any(keys in line for line in serve_check(directory, "vllm-mindspore")["notes"])
    edit_json(directory / "config.json", lambda v: v.pop("rope_theta"))
    assert "rope_theta is None, expected" not in problems(directory)  # 10000 is the default there

    def other_base(config: dict[str, Any]) -> None:
        config["rope_parameters"]["rope_theta"] = 500000.0

    edit_json(directory / "config.json", other_base)
    assert "rope_theta is None, expected 500000.0 as rope_parameters says" in problems(directory)


@pytest.mark.parametrize(
    ("rope", "pattern"),
    [
        ({"type": "yarn", "factor": 2.0}, "no original_max_position_embeddings, expected"),
        (
            {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
            "embeddings is 4: transformers 4.51.3 computes with the latter, 4.57.1, vLLM and eval",
        ),
        ({"type": "dynamic", "factor": 2.0}, "scales the dynamic rotary embedding for the longest"),
        (
            {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "mscale": 1.1},
            "vLLM reads no mscale of the yarn rotary embedding",
        ),
    ],
)
def test_rotary_embeddings_that_vllm_has_otherwise(make: Make, rope: dict, pattern: str) -> None:
    found = serve_check(make(dtype="float16", rope_scaling=rope), "vllm-mindspore")
    assert any(pattern in line for line in (*found["problems"], *found["notes"]))
    assert bool(found["problems"]) is ("expected" in pattern)


def test_a_class_that_vllm_mindspore_does_not_have(make: Make) -> None:
    directory = make(dtype="float16", family="seed_oss")
    assert "architectures is ['SeedOssForCausalLM'], expected one of Llama" in problems(directory)


def test_two_descriptions(make: Make) -> None:
    """The runtime refuses them; a copy under another name is one of them."""
    directory = make(dtype="float16")
    (directory / "my_quant_model_description.json").write_text("{}")
    assert "expected one: the runtime refuses several" in problems(directory)


def test_ranks_that_do_not_divide_the_model(make: Make) -> None:
    assert "tp is 3, expected a divisor of num_attention_heads, which is 4" in problems(
        make(), tp=3
    )


def test_schemes_and_flavours_of_runtimes(make: Make) -> None:
    dynamic = make("W8A8_DYNAMIC", "golden-stick")
    assert "W8A8_DYNAMIC is not served by vllm-mindspore's Native backend" in problems(dynamic)
    ascend = make("W8A8_DYNAMIC", "ascend")
    assert "is an ascend checkpoint, expected golden-stick" in problems(ascend)
    found = serve_check(ascend, "vllm-ascend", 2)
    assert found["line"].startswith("vllm serve ")
    assert "--quantization ascend" in found["line"]
    assert "expected float16 on a 310P" in problems(ascend, "vllm-ascend", device="310p")
    assert "is an ascend checkpoint, expected mindie-sd for mindie" in problems(ascend, "mindie")


def test_types_that_a_device_does_not_have(make: Make) -> None:
    directory = make("W8A8_MXFP8", hidden_size=64, intermediate_size=64)
    found = serve_check(directory, "vllm-ascend")
    assert found["problems"] == []
    assert "needs float8 or float4 types" in found["notes"][-1]
    assert "needs float8" in problems(directory, "vllm-ascend", device="910b")


def test_reciprocals_that_are_off_are_noted(make: Make) -> None:
    """1 / 1.5 is 0.66797 in bfloat16."""
    directory, name = make("W8A8", "ascend"), "model.layers.0.mlp.down_proj.input_scale"
    assert not any("input_scale" in note for note in serve_check(directory, "vllm-ascend")["notes"])
    edit(directory, lambda tensors: tensors[name].fill(1.5))
    (note,) = (n for n in serve_check(directory, "vllm-ascend")["notes"] if "input_scale" in n)
    assert "1 of 7 are off by more than 0.1 %" in note and f"{name} by 0.20 %" in note


def test_groups_that_ranks_do_not_divide(make: Make) -> None:
    directory = make("W8A8_MXFP8", hidden_size=64, intermediate_size=96, head_dim=32)
    assert problems(directory, "vllm-ascend") == ""
    found = problems(directory, "vllm-ascend", tp=2)
    assert "down_proj: 96 inputs on 2 ranks, expected groups of 32 on each" in found


def test_mindie(make: Make) -> None:
    """MindIE-SD checks who may read its files, and reads one for all or one for each rank."""
    directory = make("W8A8_DYNAMIC", "mindie-sd")
    files = [path for path in directory.iterdir() if path.name.startswith("quant_model_")]
    assert [path.stat().st_mode & 0o777 & ~0o640 for path in files] == [0, 0]
    for path in files:
        path.chmod(0o644)
    assert problems(directory, "mindie").count("has mode 644, expected at most 640") == len(files)
    for path in files:
        path.chmod(0o640)
    found = serve_check(directory, "mindie")
    assert found["line"].startswith("quantize(model, ")
    assert "expected --tp 1" in problems(directory, "mindie", tp=2)


def test_what_mindie_fails_on(make: Make) -> None:
    """A scheme of no other format is made all the same, and named before and after."""
    wide = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    bare = make("W4A4_MXFP4_DUALSCALE", **wide)
    reason = "q_proj: MindIE-SD fails on a W4A4_MXFP4_DUALSCALE linear without a bias in the model"
    found = serve_check(bare, "mindie")
    assert [reason in problem for problem in found["problems"]] == [True]
    pairs = "down_proj: MindIE-SD reads the scales of a W4A4_MXFP4_DUALSCALE linear in pairs, 96 in"
    with_bias = make("W4A4_MXFP4_DUALSCALE", family="llama", biases=True, **wide)
    assert pairs in problems(with_bias, "mindie") and reason not in problems(with_bias, "mindie")
    for scheme in ("W8A8_MXFP8", "W4A4_MXFP4_DUALSCALE"):
        with pytest.raises(MsQuantError, match=f"q_proj: MindIE-SD fails on a {scheme} linear wi"):
            make(scheme, "mindie-sd", **wide)
    notes = serve_check(make("W4A4_MXFP4", "mindie-sd", **wide), "mindie")["notes"]
    assert any("fail in MindIE-SD of May 2026" in note for note in notes)


def test_a_smoothed_linear_is_one_row(make: Make) -> None:
    found = serve_check(make("W8A8_DYNAMIC", "mindie-sd", algorithm="smoothquant"), "mindie")
    rows = {row["kind"]: row for row in found["loaded"]}
    assert rows.keys() >= {"qkv_proj", "down_proj"} and not rows.keys() & {"div", "linear"}
    weights, scales, factors = 16 * 24, 2 * 16, 2 * 24
    assert rows["down_proj"]["bytes"] == weights + scales + factors
    assert rows["down_proj"]["method"] == "W8A8_DYNAMIC"


def test_files_of_other_users(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make("W8A8_DYNAMIC", "mindie-sd")
    assert problems(directory, "mindie") == ""
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    monkeypatch.setattr(os, "getgid", lambda: 4321)
    assert problems(directory, "mindie").count("MindIE-SD refuses the files of others") == 2
    (weights,) = directory.glob("*.safetensors")
    weights.rename(directory / "elsewhere")
    weights.symlink_to(directory / "elsewhere")
    assert "is a symbolic link" in problems(directory, "mindie")


def test_without_a_record(make: Make) -> None:
    directory = make()
    assert "no ms_quant.json" in serve_check(directory, "vllm-mindspore")["notes"][0]


def test_arguments(tmp_path: Path) -> None:
    for arguments, pattern in (
        (("tgi", 1, ""), "runtime 'tgi' is unknown, expected one of vllm-mindspore"),
        (("mindie", 1, "a100"), "device 'a100' is unknown, expected one of 310p, 910b"),
        (("mindie", 0, ""), "tp is 0, expected 1 to 1024"),
    ):
        with pytest.raises(MsQuantError, match=pattern):
            serve_check(tmp_path, *arguments)
    with pytest.raises(MsQuantError, match="no such model directory"):
        serve_check(tmp_path / "none", "mindie")


def test_the_command(make: Make, ms_quant_command: Command) -> None:
    """A table and the line on standard output, notes and errors on the other; status 1 if not."""
    directory = make()
    runtime = ("--runtime", "vllm-mindspore")
    good = ms_quant_command("serve-check", directory, *runtime, "--tp", 2)
    assert good.returncode == 0, good.stderr
    assert "gate_up_proj" in good.stdout
    assert "vllm-mindspore serve" in good.stdout.splitlines()[-1]
    as_json = ms_quant_command("serve-check", directory, *runtime, "--json")
    assert json.loads(as_json.stdout)["command"][:2] == ["vllm-mindspore", "serve"]
    bad = ms_quant_command("serve-check", directory, *runtime, "--tp", 3)
    assert bad.returncode == 1
    assert bad.stderr.endswith("error: 1 problem found\n")
    assert "vllm-mindspore serve" not in bad.stdout
    assert os.linesep + "Traceback" not in bad.stderr
