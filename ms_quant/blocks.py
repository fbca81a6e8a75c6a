"""Quantizing the linears of one block: the part that needs no network to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ms_quant.algorithms import get_algorithm
from ms_quant.algorithms.problem import Problem, Solution, apply
from ms_quant.checkpoint.job import JobDirectory
from ms_quant.checkpoint.reader import Checkpoint
from ms_quant.models.config import block_prefix
from ms_quant.models.families import LinearGroup
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.observers import ActivationStats
from ms_quant.plan import Plan

Progress = Callable[[int, float], None]
"""Called with a block's index and how much of it is done, 0 to 1."""

WeightTransform = Callable[[str, np.ndarray, ActivationStats | None], np.ndarray]
"""Called with a linear's full path, its float32 weight and its input's statistics."""


Rounding = Callable[[Problem, Solution], tuple[dict[str, QuantizedLinear], dict[str, Any]]]
"""Makes the int8 linears of a group, and notes about them for the report. It sees the Hessian."""


@dataclass(frozen=True)
class Steps:
    """What another command puts around the algorithm.

    Attributes:
        transform: changes a weight before it is quantized (pruning).
        rounding: what makes int8 linears of the algorithm's answer; None rounds to nearest.
    """

    transform: WeightTransform | None = None
    rounding: Rounding | None = None


PLAIN = Steps()


@dataclass(frozen=True)
class Seen:
    """What calibration has seen of a group.

    Attributes:
        stats: statistics of its input.
        loss: error of the block's output with candidates in place of the float linears.
        damage: the same relative to the output of each token.
    """

    stats: ActivationStats | None
    loss: Callable[[Mapping[str, QuantizedLinear]], float]
    damage: Callable[[Mapping[str, QuantizedLinear]], float]


def quantize_group(
    plan: Plan,
    index: int,
    group: LinearGroup,
    array: Callable[[str], np.ndarray | None],
    seen: Seen,
    steps: Steps,
) -> tuple[dict[str, QuantizedLinear], dict[str, Any]]:
    """The int8 linears of one group, and what the algorithm chose."""
    prefix = block_prefix(index)
    weights, biases = {}, {}
    for member in group.members:
        weight, bias = array(f"{member}.weight"), array(f"{member}.bias")
        assert weight is not None
        if steps.transform:
            weight = steps.transform(prefix + member, weight, seen.stats)
        weights[member] = weight
        if bias is not None:
            biases[member] = bias
    problem = Problem(
        name=f"{prefix}{group.fused}",
        scheme=plan.scheme,
        weights=weights,
        biases=biases,
        stats=seen.stats,
        dtype=plan.dtype,
        loss=seen.loss,
        alpha=plan.alpha,
        damage=seen.damage,
    )
    solution = get_algorithm(plan.algorithm, plan.scheme).solve(problem)
    if steps.rounding is None:
        return apply(problem, solution), dict(solution.note)
    linears, note = steps.rounding(problem, solution)
    return linears, {**solution.note, **note}


def quantize_data_free(
    plan: Plan, checkpoint: Checkpoint, job: JobDirectory, progress: Progress
) -> None:
    """Quantizes every unfinished block of a job whose scheme needs no calibration."""
    for index in range(job.finished_blocks(), plan.config.num_layers):
        prefix = block_prefix(index)

        def array(name: str, prefix: str = prefix) -> np.ndarray | None:
            return checkpoint.read_float32(prefix + name) if name.endswith("weight") else None

        linears: dict[str, QuantizedLinear] = {}
        groups = plan.groups(index)
        for done, group in enumerate(groups):
            found, _ = quantize_group(
                plan, index, group, array, Seen(None, _no_loss, _no_loss), PLAIN
            )
            linears.update(found)
            progress(index, (done + 1) / len(groups))
        job.finish_block(index, linears, {}, {})


def _no_loss(candidate: Mapping[str, QuantizedLinear]) -> float:
    raise AssertionError("an algorithm without calibration asked for a loss")
