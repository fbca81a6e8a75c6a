"""The programs of examples/ run, and print what they are there to show."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(package_environment, tmp_path) -> Callable[..., str]:
    """Runs a program of examples/ in an empty directory: what it printed."""

    def run(name: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name), *arguments],
            env=package_environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    pytest.importorskip("mindspore")
    return run


def test_network(example, tmp_path):
    """Three ways with errors of a few percent; q, k and v are one group; loading is exact."""
    printed = example("network.py", "out")
    errors = [float(number) for number in re.findall(r"error (0\.\d+)", printed)]
    assert len(errors) == 3 and max(errors) < 0.05
    assert "blocks.1.{q, k, v}" in printed and "blocks.0.down" in printed
    assert "out/quantized_network.safetensors: the same outputs: True" in printed
    assert (tmp_path / "out" / "quantized_network.safetensors").exists()


def test_ptq_config(example):
    rows = [line.split() for line in example("ptq_config.py").splitlines()]
    assert [(row[0], row[5]) for row in rows[1:]] == [
        ("attention", "W8A8"),
        ("mlp", "W4A16"),
        ("lm_head", "FLOAT"),
    ]


def test_timestep_loop(example):
    printed = example("timestep_loop.py")
    assert "calibrate 6/6" in printed and "quantize 2/2" in printed
    assert printed.count("W8A8_TIMESTEP") == 2
    assert float(printed.split()[-2]) < 0.02


def test_checkpoint(example):
    """Two schemes in one checkpoint, both proved; perplexity grows by less than 3 %."""
    printed = example("checkpoint.py")
    assert "W4A16+W8A8_DYNAMIC as compressed-tensors, 21 linears" in printed
    assert "model.layers.0.down: W8A8_DYNAMIC by smoothquant {'alpha': 0.7}" in printed
    assert "\nright: the largest output error is 0." in printed
    before, after = map(float, re.findall(r"perplexity (\d+\.\d+)", printed))
    assert before < after < 1.03 * before


@pytest.mark.slow
def test_w8a8sc(example):
    """Half of the weights are pruned: tiles take less than 0.9 of them."""
    printed = example("w8a8sc.py")
    assert float(re.findall(r"ratio (0\.\d+)", printed)[0]) < 0.9
    before, after = map(float, re.findall(r"perplexity (\d+\.\d+)", printed))
    assert before < after < 3 * before


def test_diffusion(example, tmp_path):
    """Two ways of the table, and the picture: a row of eight frames for each and the float one."""
    few = ("--clips", "1", "--steps", "4", "--only", "mix", "time blocks")
    printed = example("diffusion.py", *few)
    rows = {line[:28].strip(): line[28:].split() for line in printed.splitlines()[1:4]}
    assert list(rows) == ["float", "mix", "time blocks"]
    assert float(rows["mix"][0]) > 40 and float(rows["mix"][6]) == 1
    assert float(rows["time blocks"][6]) == pytest.approx(0.5, abs=0.02)
    image = pytest.importorskip("PIL.Image")
    with image.open(tmp_path / "diffusion.png") as picture:
        assert picture.width > 8 * 16 and picture.height > 3 * 16


def test_every_program_is_run_here():
    """The demo has a test of its own, and ``make demo``; modules of programs are no programs."""
    text = Path(__file__).read_text()
    programs = {path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    missing = programs - {"demo.py"}
    assert [name for name in sorted(missing) if f'example("{name}"' not in text] == []
