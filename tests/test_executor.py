"""Executors: whatever the order of blocks, and in whatever process, the same bytes."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.pipeline.request import QuantizeOptions, prepare
from ms_quant.pipeline.run import run_job
from ms_quant.quantization.executor import InOrder
from ms_quant.quantization.work import BlockWork
from ms_quant.statistics.observations import Observations

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
CALIBRATED = {"samples": 6, "seq_len": 16}
LAYERS = 4


class Scrambled:
    """Observes all blocks first, then finishes them in another order, each in a process of its
    own, to which the observations go as arrays and facts.

    Args:
        seed: of the order.
        stop: die before this many blocks are finished.
    """

    def __init__(self, seed: int, stop: int = LAYERS):
        self.seed, self.stop, self.finished = seed, stop, list[int]()

    def run(self, work: BlockWork) -> None:
        observed = {}
        for index in work.unfinished():
            found = work.observe(index)
            observed[index] = found and (found.arrays(), found.facts())
        order = work.unfinished()
        random.Random(self.seed).shuffle(order)
        context = multiprocessing.get_context("fork")
        for index in order[: self.stop]:
            child = context.Process(target=finish, args=(work, index, observed[index]))
            child.start()
            child.join()
            assert child.exitcode == 0
            self.finished.append(index)
        if len(order) > self.stop:
            raise MsQuantError("stopped")


class Reversed:
    """Observes and finishes each block when its turn comes, the last block first."""

    def run(self, work: BlockWork) -> None:
        for index in reversed(work.unfinished()):
            work.finish(index, work.observe(index))


def finish(work: BlockWork, index: int, sent: Any) -> None:
    work._loaded = None  # a worker has nothing of what the observer had loaded
    work.finish(index, sent and Observations.restore(*sent))


@pytest.fixture
def options(tiny_model: Callable[..., Path], calib_text: Path) -> Callable[..., QuantizeOptions]:
    model = tiny_model(family="qwen2", layers=LAYERS, **SHAPE)

    def make(output: Path, scheme: str, algorithm: str, **more: Any) -> QuantizeOptions:
        needs = scheme == "W8A8" or algorithm != "minmax" or "kv_cache" in more
        data = {"calib": calib_text, **CALIBRATED} if needs else {}
        output.parent.mkdir()
        return QuantizeOptions(model, output, scheme, algorithm, **data, **more)

    return make


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


CASES = [
    ("W8A8_DYNAMIC", "minmax", {}),
    ("W8A8", "osl", {}),
    ("W8A8", "smoothquant+gptq", {"dtype": "float16"}),
    ("W8A8", "histogram", {}),
    ("W8A8", "minmax", {"kv_cache": "C8"}),
    ("W8A8_DYNAMIC", "awq", {"formats": ("ascend", "golden-stick")}),
]


@pytest.mark.parametrize(("scheme", "algorithm", "more"), CASES)
def test_each_executor_makes_the_same_bytes(options, tmp_path, scheme, algorithm, more):
    made = {}
    for name, executor in (
        ("in-order", InOrder()),
        ("scrambled", Scrambled(seed=3)),
        ("reversed", Reversed()),
    ):
        request = options(tmp_path / name / "out", scheme, algorithm, **more)
        run_job(request, executor=executor)
        assert not request.job_directory.exists()
        made[name] = contents(request.output)
    assert made["scrambled"] == made["in-order"] and made["reversed"] == made["in-order"]


@pytest.mark.parametrize("stop", range(LAYERS))
def test_a_job_with_some_blocks_finished_goes_on_in_any_order(options, tmp_path, stop):
    whole = options(tmp_path / "whole" / "out", "W8A8", "smoothquant")
    run_job(whole)
    request = options(tmp_path / "cut" / "out", "W8A8", "smoothquant")
    executor = Scrambled(seed=stop + 1, stop=stop)
    with pytest.raises(MsQuantError, match="stopped"):
        run_job(request, executor=executor)
    checked = prepare(request)
    assert checked.job().finished() == set(executor.finished)
    before = checked.job().measured()
    result = run_job(request, executor=Reversed() if stop % 2 else InOrder())
    assert contents(request.output) == contents(whole.output)
    found = {row.group: (row.seconds, row.error) for row in result.outputs[0].report}
    assert len(before) == stop * 4 and len(found) == LAYERS * 4
    assert {str(group): tuple(known) for group, known in before.items()}.items() <= found.items()
    assert all(seconds and error and error < 0.1 for seconds, error in found.values())


def test_hidden_states_stay_until_no_unfinished_block_begins_with_them(options, tmp_path):
    seen = []

    class Watched(Reversed):
        def run(self, work: BlockWork) -> None:
            for index in (1, 3, 0, 2):
                work.finish(index, work.observe(index))
                hidden = work.job.directory.glob("hidden-*.npy")
                seen.append(sorted(int(path.stem[-5:]) for path in hidden))

    run_job(options(tmp_path / "one" / "out", "W8A8", "minmax"), executor=Watched())
    assert seen == [[0, 2], [0, 2], [2], []]
