"""Outputs without calibration are the same bytes as ever, on every machine.

After a change that is meant to change them: ``python tools/record_outputs.py record
tests/golden/outputs.json --data-free``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "outputs.json"
OUTPUTS: dict[str, dict[str, str]] = json.loads(GOLDEN.read_text())["outputs"]
WEIGHTS = "model-00001-of-00001.safetensors"
Tool = Callable[..., subprocess.CompletedProcess[str]]


def _tool(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "record_outputs.py", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def tool(package_environment: dict[str, str]) -> Tool:
    return lambda *arguments: _tool(package_environment, *arguments)


@pytest.fixture(scope="module", params=["native kernels", "NumPy alone"])
def outputs(
    request: Any, package_environment: dict[str, str], tmp_path_factory: Any
) -> dict[str, dict[str, str]]:
    """What the commands make now."""
    path = tmp_path_factory.mktemp("golden") / "now.json"
    slow = {"MS_QUANT_ISA": "none"} if request.param == "NumPy alone" else {}
    run = _tool({**package_environment, **slow}, "record", path, "--data-free")
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(path.read_text())["outputs"]


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_command_makes_the_bytes_that_it_made(name: str, outputs: dict[str, Any]) -> None:
    assert outputs[name] == OUTPUTS[name]


def test_no_command_is_without_golden_bytes(outputs: dict[str, Any]) -> None:
    assert outputs.keys() == OUTPUTS.keys()


def test_what_differs_is_named(tool: Tool, tmp_path: Path) -> None:
    now = OUTPUTS["w4a16"]
    before = {**now, WEIGHTS: "0" * 64}
    path = tmp_path / "before.json"
    path.write_text(json.dumps({"outputs": {"w4a16": before, "ssz": OUTPUTS["ssz"]}}))
    run = tool("check", path, "--only", "w4a16", "--only", "ssz")
    assert run.returncode == 1
    assert run.stdout.splitlines() == [
        f"w4a16: {WEIGHTS} was {'0' * 64}, is {now[WEIGHTS]}",
        f"1 of 2 commands have the outputs of {path}",
    ]


def test_calibrated_outputs_of_another_machine_are_not_compared(tool: Tool, tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    only = [word for name in ("static", "w8a16", "ssz") for word in ("--only", name)]
    run = tool("record", path, *only)
    assert run.returncode == 0, run.stderr
    run = tool("check", path, *only)
    assert (run.returncode, run.stdout) == (0, f"3 of 3 commands have the outputs of {path}\n")

    recorded = json.loads(path.read_text())
    recorded["machine"]["threads"] = 999
    recorded["outputs"]["static"]["config.json"] = "another"
    path.write_text(json.dumps(recorded))
    run = tool("check", path, *only)
    assert run.returncode == 2
    first, reason, fact = run.stdout.splitlines()
    assert first == f"2 of 2 commands have the outputs of {path}"
    assert reason.startswith("not compared: 1 that are calibrated or run a model")
    assert fact.strip().startswith("threads was 999, is ")


def test_rows_that_went_and_came_are_named(tool: Tool, tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    path.write_text(json.dumps({"outputs": {"gone": {"config.json": "0"}}}))
    run = tool("check", path, "--only", "ssz")
    assert run.returncode == 1
    assert run.stdout.splitlines() == [
        "gone: no such command any more",
        f"0 of 1 commands have the outputs of {path}",
        "not compared: 1 that are not in it: ssz",
    ]
