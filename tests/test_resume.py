"""Jobs killed with SIGKILL: around every rename and at random moments; equal bytes at the end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_quant.errors import JobConflictError
from ms_quant.pipeline.quantize import quantize_checkpoint

pytestmark = pytest.mark.slow

SEED = 5

# Kills itself before or after the step on disk (a rename or a deletion) that `target` names.
CHILD = """
import os, signal, sys
from pathlib import Path

model, output, calib, scheme, algorithm, order, log, when, target = sys.argv[1:]

def say(line):
    with open(log, "a") as file:
        file.write(line + "\\n")

def watch(owner, name, place):
    original = getattr(owner, name)
    def step(*arguments, **options):
        line = f"{name} {Path(arguments[place]).name}"
        if line.endswith(".tmp"):
            return original(*arguments, **options)
        if (when, target) == ("before", line):
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        say(line)
        if (when, target) == ("after", line):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, step)

watch(Path, "replace", 1)
watch(Path, "rename", 1)
watch(Path, "unlink", 0)
watch(os, "rmdir", 0)

from ms_quant.pipeline.run import QuantizeOptions, prepare, run_job
from ms_quant.quantization.executor import InOrder

class LastFirst:
    def run(self, work):
        for index in reversed(work.unfinished()):
            work.finish(index, work.observe(index))

executor = {"in order": InOrder, "last first": LastFirst}[order]()
data = {"calib": Path(calib), "samples": 4, "seq_len": 16} if scheme == "W8A8" else {}
options = QuantizeOptions(Path(model), Path(output), scheme, algorithm, shard_bytes=6000, **data)
checked = prepare(options)
say("ready")
result = run_job(options, checked=checked, executor=executor)
say("finished before" if result.finished_before else "finished")
"""


@dataclass
class Job:
    """A job that is started again and again."""

    directory: Path
    model: Path
    calib: Path
    scheme: str
    algorithm: str
    environment: dict[str, str]
    order: str = "in order"

    def __post_init__(self) -> None:
        self.directory.mkdir()
        self.output, self.log = self.directory / "out", self.directory / "log"
        self.log.write_text("")
        self.blocks: dict[str, tuple[int, int]] = {}

    def start(self, when: str = "never", target: str = "") -> subprocess.Popen[bytes]:
        names = (self.model, self.output, self.calib, self.scheme, self.algorithm, self.order)
        arguments = [*map(str, names), str(self.log), when, target]
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def run(self, when: str = "never", target: str = "") -> bool:
        """Runs until the end, or until it kills itself; True at the end."""
        process = self.start(when, target)
        _, errors = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        self.check()
        return process.returncode == 0

    def run_for(self, seconds: float) -> bool:
        """Kills it some time after it began its work; True if it was finished before that."""
        ready = len([line for line in self.lines() if line == "ready"])
        process = self.start()
        while self.lines().count("ready") == ready and process.poll() is None:
            time.sleep(0.005)
        time.sleep(seconds)
        process.kill()
        _, errors = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        self.check()
        return process.returncode == 0

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def check(self) -> None:
        """Between two runs: no half output, and finished blocks are the files they were."""
        assert not self.output.exists() or (self.output / "ms_quant.json").exists()
        found = {
            path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in self.directory.glob("out.job/block-*.safetensors")
        }
        for name, identity in self.blocks.items():
            assert found.get(name, identity) == identity, f"{name} was written again"
        self.blocks.update(found)

    def finish(self, expected: dict[str, bytes], contents: Callable) -> None:
        """The end of every story."""
        assert contents(self.output) == expected
        assert sorted(path.name for path in self.directory.iterdir()) == ["log", "out"]
        lines = Counter(self.lines())
        for index in range(3):
            # None when a kill from outside fell between the rename and the line about it.
            assert lines[f"replace block-{index:05d}.safetensors"] <= 1


ORDERS = pytest.mark.parametrize("order", ["in order", "last first"])


@pytest.fixture
def make_job(
    tiny_model: Callable[..., Path],
    calib_text: Path,
    tmp_path: Path,
    package_environment: dict[str, str],
) -> Callable[..., Job]:
    model = tiny_model(layers=3, shards=2)

    def make(name: str, scheme: str, algorithm: str, order: str = "in order") -> Job:
        place = tmp_path / name
        return Job(place, model, calib_text, scheme, algorithm, package_environment, order)

    return make


def undisturbed(job: Job, contents: Callable) -> tuple[dict[str, bytes], list[str]]:
    """The files that a job makes, and what it does on disk, in order."""
    assert job.run()
    lines = job.lines()
    assert lines[0] == "ready" and lines[-1] == "finished"
    # Whether a hidden state that nothing needs any more is deleted now or later is no matter.
    steps = [line for line in lines[1:-1] if not line.startswith("unlink hidden")]
    assert len(steps) > 20
    return contents(job.output), steps


@ORDERS
def test_calibrated_job_killed_around_every_rename(
    make_job: Callable[..., Job], file_contents: Callable, order: str
) -> None:
    whole = make_job("whole", "W8A8", "smoothquant", order)
    expected, steps = undisturbed(whole, file_contents)
    assert sum(step.startswith("re") for step in steps) >= 18  # replace, rename
    job = make_job("killed", "W8A8", "smoothquant", order)
    kills = 0
    for number, step in enumerate(steps):
        kills += not job.run("after" if number % 2 else "before", step)
    assert kills >= 20
    assert job.run()
    job.finish(expected, file_contents)
    assert job.lines()[-1] == "finished before"


def test_calibrated_job_killed_at_random_moments(
    make_job: Callable[..., Job], file_contents: Callable
) -> None:
    whole = make_job("whole", "W8A8", "minmax")
    started = time.monotonic()
    expected, _ = undisturbed(whole, file_contents)
    job, rng = make_job("killed", "W8A8", "minmax"), np.random.default_rng(SEED)
    longest = (time.monotonic() - started) / 4  # most of it are imports
    for _ in range(6):
        job.run_for(rng.uniform(0, longest))
    assert job.run()
    job.finish(expected, file_contents)


def test_osl_job_killed_after_a_block(
    make_job: Callable[..., Job], file_contents: Callable
) -> None:
    expected, _ = undisturbed(make_job("whole", "W8A8", "osl"), file_contents)
    job = make_job("killed", "W8A8", "osl")
    assert not job.run("after", "replace block-00000.safetensors")
    assert job.run()
    job.finish(expected, file_contents)


@ORDERS
def test_data_free_job_killed_before_and_after_every_rename(
    make_job: Callable[..., Job], file_contents: Callable, order: str
) -> None:
    whole = make_job("whole", "W8A8_DYNAMIC", "minmax", order)
    expected, steps = undisturbed(whole, file_contents)
    job = make_job("killed", "W8A8_DYNAMIC", "minmax", order)
    kills = sum(not job.run(when, step) for step in steps for when in ("before", "after"))
    assert kills >= 40
    assert job.run()
    job.finish(expected, file_contents)


def test_data_free_job_killed_at_random_moments(
    make_job: Callable[..., Job], file_contents: Callable
) -> None:
    expected, _ = undisturbed(make_job("whole", "W8A8_DYNAMIC", "minmax"), file_contents)
    job, rng = make_job("killed", "W8A8_DYNAMIC", "minmax"), np.random.default_rng(SEED)
    for _ in range(20):
        job.run_for(rng.uniform(0, 0.05))
    assert job.run()
    job.finish(expected, file_contents)


def test_a_job_is_not_resumed_with_a_recipe_that_leaves_others_float(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    def recipe(block: int) -> dict[str, Any]:
        rule = {"scheme": "W8A8_DYNAMIC", "exclude": [f"model.layers.{block}.mlp.down_proj"]}
        return {"apiversion": "ms_quant_v1", "rules": [rule]}

    model = tiny_model()
    quantize_checkpoint(
        model, tmp_path / "a", recipe=recipe(0), job=tmp_path / "job", keep_job=True
    )
    with pytest.raises(JobConflictError, match="float"):
        quantize_checkpoint(model, tmp_path / "b", recipe=recipe(1), job=tmp_path / "job")
    with pytest.raises(JobConflictError, match="float"):
        quantize_checkpoint(model, tmp_path / "a", recipe=recipe(1))
