"""Trials: a choice is quantized in a job of its own, and its perplexity is measured."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.evaluation.comparison import paired_difference
from ms_quant.evaluation.perplexity import measure
from ms_quant.files.sealed import read_sealed, write_sealed
from ms_quant.formats.opening import FloatModel, JobModel, ServedModel
from ms_quant.job.redo import redoing
from ms_quant.mixed_precision.assembled import AssembledModel
from ms_quant.mixed_precision.candidates import Choice
from ms_quant.mixed_precision.recipe import recipe_of
from ms_quant.mixed_precision.request import CheckedMixed
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.pipeline.quantize import QUANTIZING, READING
from ms_quant.pipeline.request import CheckedJob, prepare
from ms_quant.pipeline.run import prove_source, run_blocks
from ms_quant.progress import StepProgress, of_blocks
from ms_quant.recipe import Recipe

TRIALS, TRIAL = "trials.json", "trial-"
MEASURING = "measuring"
FLOAT_LOSSES = "float"
PHASES = ("prefill", "decode")
Losses = dict[str, list[float]]
"""Phase to the mean loss of each window."""


class Increase(NamedTuple):
    """By how much a loss has grown, in the phase where that is more.

    Attributes:
        loss: its mean.
        error: its standard error, from one difference for each window; None of one window.
        phase: prefill or decode.
    """

    loss: float
    error: float | None
    phase: str

    @property
    def bound(self) -> float:
        """What a budget must hold: the mean and its standard error. Of many choices the one that
        seems good enough by its mean alone is one whose text flatters it."""
        return self.loss + (self.error or 0.0)

    @property
    def perplexity(self) -> float:
        """The increase of perplexity: 0.01 is 1 %."""
        return math.expm1(min(self.loss, 500.0))

    @property
    def perplexity_error(self) -> float | None:
        """Its standard error, to first order."""
        return None if self.error is None else math.exp(min(self.loss, 500.0)) * self.error


class Trials:
    """What was tried, on disk: a killed command goes on with what it has measured.

    Args:
        asked: the checked request.
        progress: told how far the steps are.
    """

    def __init__(self, asked: CheckedMixed, progress: StepProgress):
        self.asked, self.progress = asked, progress
        self.path = asked.directory / TRIALS
        windows = 0 if asked.heldout is None else len(asked.heldout)
        self.measured = _read(self.path, windows) if self.path.exists() else {}
        self.count = 0

    def job(self, choice: Choice, made: dict[str, Any] | None = None) -> CheckedJob:
        """The request that quantizes a choice; its job lies in the directory of the work."""
        asked = self.asked
        recipe = recipe_of(asked.model.config, choice, asked.options.job, asked.format, made or {})
        job = replace(plain_request(asked, recipe), job=self._directory(recipe))
        return prepare(job, model=asked.model)

    def estimate(self, choice: Choice) -> Increase:
        """How much worse a choice predicts the held-out text than the float model.

        It is put together from what the analysis has quantized, where that was kept.
        """
        if self.asked.analysis is None:
            return self.increase(choice)
        kept, key = self.asked.analysis, _digest([sorted(choice.items()), self._text])
        return self._found(key, lambda title: self._phases(AssembledModel(kept, choice), title))

    def increase(self, choice: Choice) -> Increase:
        """The same of what is quantized as it will be written."""
        checked = self.job(choice)
        key = _digest([checked.record, self._text])
        return self._found(key, lambda title: self._quantized(checked, title))

    @property
    def _text(self) -> Any:
        return self.asked.asked.get("heldout_sha256")

    def _found(self, key: str, measured: Callable[[str], Losses]) -> Increase:
        if key not in self.measured:
            self.count += 1
            self.measured[key] = measured(f"trial {self.count}")
            write_sealed(self.path, self.measured)
        exact, found = _column(self._float()["prefill"]), []
        for phase, losses in self.measured[key].items():
            loss, error = paired_difference(_column(losses), exact)
            found.append(Increase(loss, error, phase))
        return max(found, key=lambda increase: increase.bound)

    def forget(self, choice: Choice) -> None:
        """Removes the job of a choice."""
        checked = self.job(choice)
        with suppress(MsQuantError):
            job = checked.job()
            if job.directory.is_dir():
                with job.open():
                    job.remove()

    def _directory(self, recipe: Recipe) -> Path:
        rules = [[rule.scheme, rule.include, rule.exclude] for rule in recipe.rules]
        return self.asked.directory / f"{TRIAL}{_digest(rules)[:12]}"

    def _quantized(self, checked: CheckedJob, title: str) -> Losses:
        job, blocks = checked.job(), checked.plan.config.num_layers
        told = of_blocks(self.progress, f"{title}: {QUANTIZING}", blocks)
        with job.open():
            prove_source(checked, job, partial(self.progress, READING))

            def losses() -> Losses:
                run_blocks(checked, job, told)
                return self._phases(JobModel(checked.plan, job, checked.tensors), title)

            return redoing(job, losses)

    def _phases(self, model: ServedModel, title: str) -> Losses:
        phases = PHASES[: 1 + model.phased]
        return {phase: self._losses(model, phase, title) for phase in phases}

    def _float(self) -> Losses:
        if FLOAT_LOSSES not in self.measured:
            model = FloatModel(self.asked.options.job.model)
            self.measured[FLOAT_LOSSES] = {"prefill": self._losses(model, "prefill", "float")}
            write_sealed(self.path, self.measured)
        return self.measured[FLOAT_LOSSES]

    def _losses(self, model: ServedModel, phase: str, title: str) -> list[float]:
        tokens = self.asked.heldout
        assert tokens is not None
        step = f"{title}: {MEASURING}" + (f" {phase}" if model.phased else "")
        told = of_blocks(self.progress, step, model.config.num_layers)
        found = measure(model, tokens, told, decode=phase == "decode")
        return found.losses.astype(np.float64).mean(axis=1).tolist()


def plain_request(asked: CheckedMixed, recipe: Recipe) -> QuantizeOptions:
    """The request of a recipe: what it decides is said by it alone."""
    return replace(
        asked.options.job,
        recipe=recipe,
        keep_job=False,
        calib=None if recipe.calib is None else Path(recipe.calib),
        samples=recipe.samples,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        scheme=DEFAULTS.scheme,
        algorithm=DEFAULTS.algorithm,
        scheme_options={},
        algorithm_options={},
        exclude=(),
        kv_cache=DEFAULTS.kv_cache,
        formats=(asked.format,),
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _column(losses: list[float]) -> np.ndarray:
    return np.array(losses)[:, None]


def _read(path: Path, windows: int) -> dict[str, Losses]:
    """What was measured before, on so many windows.

    Raises:
        MsQuantError: the file is malformed.
    """
    found = read_sealed(path)
    if found is None:
        raise _malformed(path)
    for losses in found.values():
        good = isinstance(losses, dict) and {PHASES[0]} <= set(losses) <= set(PHASES)
        if not good or not all(_are_losses(found, windows) for found in losses.values()):
            raise _malformed(path)
    return found


def _malformed(path: Path) -> BadFileError:
    return BadFileError(f"{path}: is malformed or has changed; delete it to measure again")


def _are_losses(found: Any, windows: int) -> bool:
    return (
        isinstance(found, list)
        and len(found) == windows
        and all(isinstance(loss, float) and math.isfinite(loss) for loss in found)
    )
