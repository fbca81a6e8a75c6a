"""eval and generate where MindSpore cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ms_quant.pipeline.run import QuantizeOptions, run_job
from sparse_compress.pipeline.request import SparseOptions
from sparse_compress.pipeline.run import run

WITHOUT = """
import json, sys
sys.modules["mindspore"] = None  # neither found nor imported
from typer.testing import CliRunner
from ms_quant.cli.main import app
text, *checkpoints = sys.argv[1:]
windows = ["--text", text, "--seq-len", "8", "--windows", "2", "--json"]
words = ["--prompt", "the quick", "--max-tokens", "3", "--json"]
for checkpoint in checkpoints:
    for command in (["eval", checkpoint, *windows], ["generate", checkpoint, *words]):
        done = CliRunner().invoke(app, command)
        print(json.dumps([done.exit_code, done.stdout, repr(done.exception)]))
"""
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "W8A8": {"scheme": "W8A8"},
    "W4A16": {"scheme": "W4A16", "scheme_options": {"group_size": 32}},
    "C8": {"scheme": "W8A16", "kv_cache": "C8"},
    "W8A8_MIX": {"scheme": "W8A8_MIX"},
    "W8A8_MXFP8": {"scheme": "W8A8_MXFP8"},
}


@pytest.fixture
def checkpoints(
    tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> dict[str, Path]:
    source = tiny_model(layers=1, hidden_size=320, intermediate_size=320, head_dim=80)
    made = {"float": source, "W8A8SC": tmp_path / "W8A8SC"}
    for name, options in CHECKPOINTS.items():
        made[name] = tmp_path / name
        cached = options.get("kv_cache", "")
        needed = cached or name in ("W8A8", "W8A8_MIX")
        data = {"calib": calib_text, "samples": 2, "seq_len": 8} if needed else {}
        run_job(QuantizeOptions(source, made[name], **options, **data))
    run(SparseOptions(source, made["W8A8SC"], calib_text, samples=2, seq_len=8, sparsity=0.5))
    return made


def test_they_evaluate_and_generate(
    checkpoints: dict[str, Path], calib_text: Path, package_environment: dict[str, str]
) -> None:
    command = [sys.executable, "-c", WITHOUT, calib_text, *checkpoints.values()]
    done = subprocess.run(
        list(map(str, command)),
        env=package_environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    results = list(map(json.loads, done.stdout.splitlines()))
    assert len(results) == 2 * len(checkpoints), done.stderr
    for number, (name, path) in enumerate(checkpoints.items()):
        for code, _, error in results[2 * number : 2 * number + 2]:
            assert code == 0, (name, error)
        evaluated, written = (json.loads(r[1]) for r in results[2 * number : 2 * number + 2])
        assert evaluated["checkpoint"] == str(path) and evaluated["perplexity"] > 1
        assert ("perplexity_decode" in evaluated) == (name == "W8A8_MIX")
        assert len(written["tokens"]) <= 3
    kinds = {name: json.loads(results[2 * i][1])["kv_cache"] for i, name in enumerate(checkpoints)}
    assert kinds["C8"] == "C8" and kinds["W8A8"] == "float"
