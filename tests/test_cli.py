"""The ms-quant command as a user runs it: help, JSON, errors in one line, no MindSpore needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_quant.schemes.table import SCHEMES

pytestmark = pytest.mark.slow

COMMANDS = ["quantize", "analyze", "verify", "eval", "generate", "inspect", "schemes"]
NO_IMPORT = """
import sys
class Finder:
    def find_spec(self, name, *rest):
        assert name != "mindspore._c_expression", "a dry run imports MindSpore"
sys.meta_path.insert(0, Finder())
"""
NO_MINDSPORE = "import sys; sys.modules['mindspore'] = None  # neither found nor imported"
Run = Callable[..., subprocess.CompletedProcess[str]]


def result(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Standard output, which is one JSON object and nothing else."""
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("{") and run.stdout.endswith("}\n")
    return json.loads(run.stdout)


def error(run: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal, without its "error: "."""
    assert run.returncode != 0
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, run.stderr
    assert run.stderr.splitlines()[-1] == lines[0]
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, ms_quant_command: Run) -> None:
    run = ms_quant_command(command, "--help")
    assert run.returncode == 0
    assert f"Example:  ms-quant {command}" in " ".join(run.stdout.split(" "))
    assert "--json" in run.stdout
    assert run.stderr == ""


def test_help_of_all_and_version(ms_quant_command: Run) -> None:
    run = ms_quant_command("--help")
    assert run.returncode == 0
    assert all(command in run.stdout for command in COMMANDS)
    assert ms_quant_command("--version").stdout.startswith("ms-quant ")
    assert ms_quant_command("frobnicate").returncode != 0


def test_the_whole_story_in_json(
    ms_quant_command: Run, tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    model, output = tiny_model(), tmp_path / "out"
    options = ["--algorithm", "osl", "--calib", calib_text, "--samples", 2, "--seq-len", 8]
    arguments = ["quantize", model, "-o", output, *options, "--json"]
    planned = result(ms_quant_command(*arguments, "--dry-run"))
    assert planned["format"] == "golden-stick"
    assert planned["blocks"] == 2 and planned["calibration_tokens"] == 16
    assert {"estimated_seconds", "memory_bytes", "output_bytes", "served_by"} <= planned.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib.txt", "model"]
    run = ms_quant_command(*arguments)
    made = result(run)
    assert "quantizing" in run.stderr and "100%" in run.stderr
    assert made["quantized_linears"] == 14 and made["finished_before"] is False
    assert made["tensor_bytes"] == planned["output_bytes"]
    assert result(ms_quant_command(*arguments))["finished_before"] is True

    proved = result(ms_quant_command("verify", output, "--source", model, "--json"))
    assert proved["problems"] == [] and len(proved["layers"]) == 14
    found = result(ms_quant_command("inspect", output, "--json"))
    assert found["format"] == "golden-stick W8A8"
    assert {row["stored_as"] for row in found["linears"]} == {"I8"}
    run = ms_quant_command("eval", output, "--text", calib_text, "--seq-len", 8, "--json")
    measured = result(run)
    assert measured["perplexity"] == pytest.approx(np.exp(measured["loss"]))
    assert "evaluating" in run.stderr and "100%" in run.stderr
    arguments = ["generate", output, "--prompt", "the quick", "--max-tokens", 3, "--json"]
    written = result(ms_quant_command(*arguments))
    assert written["prompt"] == "the quick" and len(written["tokens"]) <= 3

    shard = next(output.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    run = ms_quant_command("verify", output, "--json")
    assert run.returncode != 0 and "error: 1 problem found" in run.stderr
    assert json.loads(run.stdout)["problems"][0].startswith(f"{shard}: sha256 differs")


def test_tables_for_people(
    ms_quant_command: Run, tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    model, output = tiny_model(layers=1), tmp_path / "out"
    run = ms_quant_command("quantize", model, "-o", output, "--scheme", "W8A8_DYNAMIC")
    assert run.returncode == 0
    assert "Native (--quantization golden-stick) does not serve W8A8_DYNAMIC" in run.stderr
    run = ms_quant_command("verify", output, "--source", model)
    assert run.returncode == 0 and "7 quantized linears" in run.stdout
    run = ms_quant_command("inspect", output)
    assert "model.layers.0.mlp.down_proj" in run.stdout and "16 x 24" in run.stdout
    for line in ("W8A8_DYNAMIC", "smoothquant", "osl"):
        assert line in ms_quant_command("schemes").stdout


def bad_missing_shard(model: Path, calib: Path) -> str:
    (model / "model-00001-of-00002.safetensors").unlink()
    return "model-00001-of-00002.safetensors: no such file, expected as "


def bad_truncated(model: Path, calib: Path) -> str:
    path = model / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return "model-00002-of-00002.safetensors: "


def bad_shape(model: Path, calib: Path) -> str:
    set_config(model, intermediate_size=48)
    return "has shape [16, 24], expected [16, 48]"


def bad_nan(model: Path, calib: Path) -> str:
    path = model / "model-00001-of-00002.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    name = next(key for key in header if key.endswith("_proj.weight"))
    first = start + header[name]["data_offsets"][0]
    path.write_bytes(data[:first] + b"\xc0\x7f" + data[first + 2 :])
    return f"{name}' holds 1 NaN or infinite values"


def bad_type(model: Path, calib: Path) -> str:
    set_config(model, model_type="gpt2")
    return "model_type 'gpt2' is not supported, expected one of deepseek_v3, glm4"


def bad_config(model: Path, calib: Path) -> str:
    (model / "config.json").write_text("{")
    return "config.json: not valid JSON"


def bad_calibration(model: Path, calib: Path) -> str:
    calib.write_text("")
    return "calib.txt: 0 bytes, expected between 1 and "


def bad_output(model: Path, calib: Path) -> str:
    out = model.with_name("out")
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    return "out: exists with other content, expected a new or empty directory"


def set_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "spoil",
    [
        bad_missing_shard,
        bad_truncated,
        bad_shape,
        bad_nan,
        bad_type,
        bad_config,
        bad_calibration,
        bad_output,
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_output(
    spoil: Callable[[Path, Path], str],
    ms_quant_command: Run,
    tiny_model: Callable[..., Path],
    calib_text: Path,
    tmp_path: Path,
) -> None:
    model, output = tiny_model(shards=2), tmp_path / "out"
    message = spoil(model, calib_text)
    arguments = ["--calib", calib_text, "--samples", 2, "--seq-len", 8, "--json"]
    assert message in error(ms_quant_command("quantize", model, "-o", output, *arguments))
    if spoil is bad_output:
        assert [path.name for path in output.iterdir()] == ["thesis.tex"]
    else:
        assert not output.exists()


def test_a_full_disk_is_one_sentence_and_the_job_goes_on(
    ms_quant_command: Run, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    full = """
import errno, os
from ms_quant.files import atomic
fsync, calls = os.fsync, 0
def limited(descriptor):
    global calls
    calls += 1
    if calls == 9:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync(descriptor)
os.fsync = limited
"""
    model, output = tiny_model(), tmp_path / "out"
    arguments = ["quantize", model, "-o", output, "--scheme", "W8A8_DYNAMIC", "--json"]
    run = ms_quant_command(*arguments, before=full)
    assert "no space left on device while writing" in error(run)
    assert not output.exists()
    assert result(ms_quant_command(*arguments))["finished_before"] is False


def test_a_disk_too_small_is_said_at_once(
    ms_quant_command: Run, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    small = """
import shutil, types
shutil.disk_usage = lambda path: types.SimpleNamespace(total=10, free=9)
"""
    arguments = ["--scheme", "W8A8_DYNAMIC", "-o", tmp_path / "out"]
    found = error(ms_quant_command("quantize", tiny_model(), *arguments, before=small))
    assert "9 bytes are free, expected at least " in found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_place_that_cannot_be_made_is_said_to_be_so(
    ms_quant_command: Run, tiny_model: Callable[..., Path]
) -> None:
    arguments = ["--scheme", "W8A8_DYNAMIC", "-o", "/proc/x/o", "--dry-run"]
    found = error(ms_quant_command("quantize", tiny_model(), *arguments))
    assert found == "/proc/x/o.partial: cannot be made, /proc cannot be written"


def test_a_defect_of_our_own_is_one_sentence(
    ms_quant_command: Run, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    defect = """
from ms_quant.pipeline import request
def fail(*arguments):
    raise KeyError("first line\\nsecond line")
request.fingerprint = fail
"""
    arguments = ["--scheme", "W8A8_DYNAMIC", "-o", tmp_path / "out"]
    run = ms_quant_command("quantize", tiny_model(), *arguments, before=defect)
    assert run.returncode == 1
    assert error(run).startswith("internal error: KeyError: ")
    assert error(run).endswith(" (please report)")


def test_a_prompt_that_is_not_text(ms_quant_command: Run, tiny_model: Callable[..., Path]) -> None:
    run = ms_quant_command("generate", tiny_model(), "--prompt", os.fsdecode(b"the \xff"))
    assert error(run) == "prompt: 'the \\udcff' is not UTF-8 text"


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("when", ["importing", "quantizing"])
def test_an_interrupt_is_one_sentence_and_status_130(
    when: str,
    package_environment: dict[str, str],
    tiny_model: Callable[..., Path],
    calib_text: Path,
    tmp_path: Path,
) -> None:
    """MindSpore's own handler would end the process with SIGTERM, without a word."""
    script = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
when = sys.argv.pop(1)
import ms_quant.cli.main, ms_quant.cli.console
if when == "importing":
    class Finder:
        def find_spec(self, name, *rest):
            if name == "mindspore.nn":
                os.kill(os.getpid(), signal.SIGINT)
    sys.meta_path.insert(0, Finder())
else:
    from ms_quant.pipeline import run as pipeline
    original = pipeline.run_blocks
    def run_blocks(checked, job, progress, *others):
        def interrupted(index, part):
            os.kill(os.getpid(), signal.SIGINT)
        original(checked, job, interrupted, *others)
    pipeline.run_blocks = run_blocks
ms_quant.cli.main.main()
"""
    model, data = tiny_model(), ["--samples", 2, "--seq-len", 8]
    command = ["quantize", model, "-o", tmp_path / "out", "--calib", calib_text, *data]
    if when == "importing":
        command += ["--scheme", "W4A4_FLATQUANT_DYNAMIC"]
    run = subprocess.run(
        [sys.executable, "-c", script, when, *map(str, command)],
        env=package_environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 130, run.stderr
    assert error(run) == "interrupted"


def test_the_plan_of_a_sparse_dry_run(
    package_environment: dict[str, str],
    tiny_model: Callable[..., Path],
    calib_text: Path,
    tmp_path: Path,
) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    model = tiny_model(family="llama", layers=1, **sizes)
    script = "from sparse_compress.cli import main\nmain()"
    options = ["--calib", calib_text, "--samples", 2, "--seq-len", 8, "--tp", 1, "--dry-run"]
    arguments = ["run", model, "-o", tmp_path / "out", *options, "--json"]
    run = subprocess.run(
        [sys.executable, "-c", f"{NO_IMPORT}\n{script}", *map(str, arguments)],
        env=package_environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    plan = result(run)
    sentence = "vllm-mindspore serves W8A8SC only for qwen2 and qwen3, not llama"
    assert plan["not_served_by"] == [sentence] and f"note: {sentence}" in run.stderr
    assert len(plan["compressed"]) == 4 and plan["uncompressed"] == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib.txt", "model"]


QUANTIZE = ["quantize", "{model}", "-o", "{out}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*QUANTIZE, "--recipe", "no.yaml"], "no.yaml: no such file"),
        ([*QUANTIZE, "--recipe", "{calib}"], "calib.txt: "),
        ([*QUANTIZE, "--recipe", "no.yaml", "--alpha", "0.5"], "--alpha: no.yaml says what each"),
        ([*QUANTIZE, "--format", "gguf"], "format 'gguf' is unknown, expected one of golden-stick"),
        (["convert", "{model}", "-o", "{out}", "--format", "ascend"], "is a float checkpoint, exp"),
        (["verify", "nowhere"], "nowhere: no such model directory"),
        (["verify", "{model}"], "model: is a float checkpoint, expected a golden-stick"),
        (["inspect", "nowhere"], "nowhere: no such model directory"),
        (["eval", "nowhere", "--text", "{calib}"], "nowhere: no such model directory"),
        (["eval", "{model}", "--text", "nowhere.txt"], "nowhere.txt: no such file"),
        (["generate", "{model}", "--prompt", ""], "the prompt has no tokens"),
        (
            ["eval", "{model}", "--text", "{calib}", "--seq-len", "16", "--kv-cache", "C8"],
            "kv cache C8: the checkpoint has no scales for it, expected another",
        ),
        (
            [*QUANTIZE, "--calib", "{calib}", "--kv-cache", "C8", "--format", "golden-stick"],
            "kv cache C8: a golden-stick checkpoint cannot hold it, expected --format ascend",
        ),
        (["quantize", "nowhere", "-o", "{out}"], "nowhere: no such model directory"),
        (["quantize", "{model}", "-o", ".", "--calib", "{calib}"], ".: the output has no name"),
    ],
)
def test_other_refusals(
    arguments: list[str],
    message: str,
    ms_quant_command: Run,
    tiny_model: Callable[..., Path],
    calib_text: Path,
    tmp_path: Path,
) -> None:
    paths = {"model": tiny_model(layers=1), "calib": calib_text, "out": tmp_path / "out"}
    run = ms_quant_command(*(argument.format(**paths) for argument in arguments))
    assert message in error(run)
    assert not (tmp_path / "out").exists()


def test_calibration_without_native_kernels(
    ms_quant_command: Run, tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    """It says so once, and NumPy does the work."""
    missing = "from ms_quant.kernels import native\nnative._load = lambda: (None, 'no kernels')"
    arguments = ["--calib", calib_text, "--samples", 2, "--seq-len", 20, "--algorithm", "osl"]
    run = ms_quant_command(
        "quantize", tiny_model(), "-o", tmp_path / "out", *arguments, "--json", before=missing
    )
    assert result(run)["quantized_linears"] > 0
    assert run.stderr.count("note: no kernels") == 1


def test_without_mindspore(
    ms_quant_command: Run, tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    model, output = tiny_model(layers=1), tmp_path / "out"

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return ms_quant_command(*arguments, before=NO_MINDSPORE)

    dynamic = ["quantize", model, "-o", output, "--scheme", "W8A8_DYNAMIC", "--json"]
    assert result(run(*dynamic, "--dry-run"))["blocks"] == 1
    assert result(run(*dynamic))["quantized_linears"] == 7
    data = ["--calib", calib_text, "--samples", 2, "--seq-len", 8]
    static = ["quantize", model, "-o", tmp_path / "static", "--algorithm", "osl+gptq", *data]
    assert result(run(*static, "--json"))["quantized_linears"] == 7
    assert result(run("verify", output, "--source", model, "--json"))["problems"] == []
    assert result(run("inspect", output, "--json"))["format"] == "golden-stick W8A8_DYNAMIC"
    assert result(run("inspect", model, "--json"))["format"] == "float"
    assert len(result(run("schemes", "--json"))["schemes"]) == len(SCHEMES)
    flat = ["quantize", model, "-o", tmp_path / "flat", "--scheme", "W4A4_FLATQUANT_DYNAMIC", *data]
    assert "needs MindSpore: pip install 'ms-quant[mindspore]'" in error(run(*flat))
    assert not (tmp_path / "flat").exists()
