"""The price of a bit that reaches a goal: a size, or how much worse the model may become.

Beside the job directory lies JOB.measure: the curves of all linears, and the prices that were
tried. Both are resumed and, at the end, removed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ms_quant.errors import BadArgumentError, MsQuantError
from ms_quant.evaluation.perplexity import perplexity
from ms_quant.files.sealed import read_sealed, write_sealed
from ms_quant.formats.opening import FloatModel, JobModel, ServedModel
from ms_quant.job.directory import JobDirectory
from ms_quant.job.redo import redoing
from ms_quant.models.names import block_prefix
from ms_quant.pipeline.request import CheckedJob
from ms_quant.pipeline.run import prove_source, run_blocks
from ms_quant.progress import BlockProgress, StepProgress, of_blocks
from ms_quant.quantization.hooks import BlockHooks
from sparse_compress.rate.goal import Goal
from sparse_compress.rate.share import (
    Curve,
    local_prices,
    predict,
    price_for_ratio,
    price_for_relative_mse,
)
from sparse_compress.rate.steps import choosing, measure

TRIES = "tries.json"
MOST_TRIES = 8
AIM = 0.995
"""Of a target ratio, so that what is predicted from some rows does not end above it."""
CLOSE = 0.9
"""A try is good enough when it uses this much of the budget."""
FARTHEST = 16.0
"""The predicted relative MSE changes by no more than this factor from one try to the next."""
INSIDE = 0.1
"""A try between two others keeps this part of their distance, in logarithms, from each."""
SAME = 0.02
"""No relative MSE is tried that is nearer than this to one that was, in logarithms."""


class Found(NamedTuple):
    """Attributes:
    checked: the request with a job of that price.
    hooks: how its blocks are rounded.
    facts: JSON for the record: ``price``, ``predicted_ratio`` and, where it was the goal,
        ``float_perplexity``, ``perplexity`` and ``heldout_windows``.
    """

    checked: CheckedJob
    hooks: BlockHooks
    facts: dict[str, Any]


class Search:
    """Finds the price for a goal.

    Args:
        checked: the checked request.
        goal: what to reach.
        progress: told how far the steps ``"read"``, ``"measure"``, ``"quantize"`` and
            ``"evaluate"`` are.
    """

    def __init__(self, checked: CheckedJob, goal: Goal, progress: StepProgress):
        self.checked, self.goal, self.progress = checked, goal, progress
        self.measuring = measuring_job(checked)

    def find(self) -> Found:
        """Measures, and tries prices where the goal asks for it.

        Raises:
            MsQuantError: the goal cannot be reached.
        """
        with self.measuring.open():
            prove_source(self.checked, self.measuring, partial(self.progress, "read"))
            blocks = self._progress("measure")
            run_blocks(self.checked, self.measuring, blocks, BlockHooks(rounding=measure))
            curves = read_curves(self.checked, self.measuring)
            if self.goal.target_ratio is not None:
                price = price_for_ratio(curves, self.goal.target_ratio, AIM)
                return self._found(curves, price, {})
            return self._try_prices(curves)

    def _progress(self, step: str) -> BlockProgress:
        return of_blocks(self.progress, step, self.checked.plan.config.num_layers)

    def _found(self, curves: Mapping[str, Curve], price: float, facts: dict[str, Any]) -> Found:
        hooks = BlockHooks(rounding=choosing(local_prices(curves, price)))
        known = {"price": price, "predicted_ratio": predict(curves, price).ratio}
        return Found(at_price(self.checked, price), hooks, {**known, **facts})

    def _try_prices(self, curves: Mapping[str, Curve]) -> Found:
        assert self.goal.max_ppl_increase is not None
        budget = math.log1p(self.goal.max_ppl_increase)
        path = self.measuring.directory / TRIES
        goals, tries = read_tries(path, self.goal)
        if "float" not in tries:
            tries["float"] = self._loss(FloatModel(self.checked.options.model))
            write_sealed(path, goals)
        points: list[tuple[float, float, float]] = []
        relative_mse = budget
        for number in range(MOST_TRIES):
            price = price_for_relative_mse(curves, relative_mse)
            relative_mse = predict(curves, price).relative_mse
            if any(abs(math.log(relative_mse / tried)) < SAME for _, tried, _ in points):
                break
            found = self._found(curves, price, {})
            if number == len(tries["losses"]):
                self._forget([price for price, _, _ in points])
                tries["losses"].append(self._loss_of_job(found))
                write_sealed(path, goals)
            points.append((price, relative_mse, tries["losses"][number] - tries["float"]))
            if CLOSE * budget <= points[-1][2] <= budget:
                break
            relative_mse = next_relative_mse([point[1:] for point in points], budget)
        price, _, increase = self._best(points, budget)
        self._forget([other for other, _, _ in points if other != price])
        before = math.exp(tries["float"])
        assert self.goal.tokens is not None
        facts = {
            "float_perplexity": before,
            "perplexity": before * math.exp(increase),
            "heldout_windows": len(self.goal.tokens),
        }
        return self._found(curves, price, facts)

    def _best(
        self, points: list[tuple[float, float, float]], budget: float
    ) -> tuple[float, float, float]:
        good = [point for point in points if point[2] <= budget]
        if good:
            return max(good)
        least = min(point[2] for point in points)
        self._forget([price for price, _, _ in points])
        raise BadArgumentError(
            f"max ppl increase {100 * math.expm1(budget):g} % cannot be reached: the least that "
            f"was found is {100 * math.expm1(least):.3g} %, of which quantized activations are a "
            "part"
        )

    def _loss_of_job(self, found: Found) -> float:
        job = found.checked.job()
        with job.open():
            return redoing(job, lambda: self._loss_of_blocks(found, job))

    def _loss_of_blocks(self, found: Found, job: JobDirectory) -> float:
        checked = found.checked
        run_blocks(checked, job, self._progress("quantize"), found.hooks)
        return self._loss(JobModel(checked.plan, job, checked.tensors))

    def _loss(self, model: ServedModel) -> float:
        assert self.goal.tokens is not None
        return perplexity(model, self.goal.tokens, self._progress("evaluate")).loss

    def _forget(self, prices: list[float]) -> None:
        """Removes the job of a price that was tried; there is one job directory for all."""
        for price in prices:
            remove_job(at_price(self.checked, price).job)


def next_relative_mse(points: list[tuple[float, float]], budget: float) -> float:
    """The relative MSE to predict in the next try.

    The increase of the loss is taken as a power of the relative MSE: through the largest one that
    was within the budget and the next that was not; where there are no such two, through the two
    tries nearest to the budget; after one try as proportional to it.

    Args:
        points: relative MSE predicted and increase found, of each try so far; none is so near to
            the budget that no other is wanted.
        budget: the largest increase.
    """
    goal = budget * (1 + CLOSE) / 2
    low = max((point for point in points if point[1] <= budget), default=None)
    over = [point for point in points if point[1] > budget]
    high = min((point for point in over if low is None or point[0] > low[0]), default=None)
    if low and high:
        power = _power(low, high)
        part = math.log(goal / low[1]) / power / math.log(high[0] / low[0]) if power else 0.5
        return low[0] * (high[0] / low[0]) ** min(max(part, INSIDE), 1 - INSIDE)
    first, *more = sorted(points, key=lambda point: abs(point[1] - budget))[:2]
    power = _power(first, more[0]) if more else float(first[1] > 0)
    least, most = (low[0], low[0] * FARTHEST) if low else (min(over)[0] / FARTHEST, min(over)[0])
    if power:
        distance = math.log(goal / first[1]) / power
        if math.log(least / first[0]) < distance < math.log(most / first[0]):
            return first[0] * math.exp(distance)
    return math.sqrt(least * most)


def _power(a: tuple[float, float], b: tuple[float, float]) -> float:
    """The power of the relative MSE that the increase is between two tries; 0 where it is none."""
    if min(a[1], b[1]) <= 0 or a[0] == b[0]:
        return 0.0
    return max(0.0, math.log(b[1] / a[1]) / math.log(b[0] / a[0]))


def at_price(checked: CheckedJob, price: float) -> CheckedJob:
    """The request with a job of that price."""
    return replace(checked, record={**checked.record, "price": price}, unknown=())


def measuring_directory(job: Path) -> Path:
    return job.with_name(job.name + ".measure")


def measuring_job(checked: CheckedJob) -> JobDirectory:
    """The job whose blocks hold curves and no linears."""
    options = checked.options
    record = {key: value for key, value in checked.record.items() if key != "rate"}
    record["phase"] = "measure"
    directory = measuring_directory(options.job_directory)
    return JobDirectory(directory, record, options.any_environment)


def remove_measured(checked: CheckedJob) -> None:
    """Removes what measuring left, where it is of this request."""
    directory = measuring_directory(checked.options.job_directory)
    begun = directory.glob(f".{TRIES}.*.tmp")
    remove_job(lambda: measuring_job(checked), directory / TRIES, *begun)


def remove_job(make: Callable[[], JobDirectory], *files: Path) -> None:
    """Removes a job with some files in it, unless its directory is of another job or in use."""
    with suppress(MsQuantError):
        job = make()
        if job.directory.is_dir():
            with job.open():
                for path in files:
                    path.unlink(missing_ok=True)
                job.remove()


def read_curves(checked: CheckedJob, job: JobDirectory) -> dict[str, Curve]:
    """The curves of a finished measurement, by fused path."""
    plan, curves = checked.plan, {}
    for index in range(plan.config.num_layers):
        notes = job.notes(index)
        for group in plan.groups(index):
            name = f"{block_prefix(index)}{group.fused}"
            try:
                curves[name] = Curve.from_json(notes[group.name])
            except (KeyError, TypeError, ValueError, OverflowError):
                raise _malformed(job.block_file(index)) from None
    return curves


def read_tries(path: Path, goal: Goal) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was tried: for all goals, and of these the entry of one.

    Raises:
        MsQuantError: the file is malformed.
    """
    goals = read_sealed(path)
    if goals is None and path.exists():
        raise _malformed(path)
    goals = goals or {}
    tries = goals.setdefault(json.dumps(goal.record(), sort_keys=True), {"losses": []})
    if not isinstance(tries, dict) or not isinstance(tries.get("losses"), list):
        raise _malformed(path)
    found = [*tries["losses"], *([tries["float"]] if "float" in tries else [])]
    if not all(isinstance(loss, float) and math.isfinite(loss) for loss in found):
        raise _malformed(path)
    return goals, tries


def _malformed(path: Path) -> MsQuantError:
    return BadArgumentError(
        f"{path}: is malformed or has changed; delete {path.parent} to measure again"
    )
