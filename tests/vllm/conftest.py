"""Tests with vLLM itself, which `make test-vllm` installs; not collected without it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def _run(*arguments: object) -> None:
    script = "from sparse_compress.cli import main; main()"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as W8A8SC for two ranks."""
    output = tmp_path_factory.mktemp("bundled") / "w8a8sc"
    text = ROOT / "models" / "text" / "calibration.txt"
    options = ("--calib", text, "--tp", 2, "--samples", 4)
    _run("run", ROOT / "models" / "stdlib-qwen3-6m", "-o", output, *options)
    return output


@pytest.fixture(scope="session")
def decompressed(checkpoint: Path) -> Path:
    """What `sparse-compress decompress` makes of it."""
    output = checkpoint.with_name("w8a8s")
    _run("decompress", checkpoint, "-o", output)
    return output


@pytest.fixture(scope="session")
def both_ranks(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes of a tensor-parallel group have loaded, a file each and device."""
    place = tmp_path_factory.mktemp("ranks")
    script = str(Path(__file__).with_name("rank.py"))
    children = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(place), str(checkpoint)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for child in children:
            _, errors = child.communicate(timeout=120)
            assert child.returncode == 0, errors[-3000:]
    finally:
        for child in children:
            child.kill()
    return place
