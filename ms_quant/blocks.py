"""Quantizing the linears of one block: the part that needs no network to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ms_quant.algorithms import get_algorithm
from ms_quant.algorithms.problem import Problem, apply
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


def quantize_group(
    plan: Plan,
    index: int,
    group: LinearGroup,
    array: Callable[[str], np.ndarray | None],
    stats: ActivationStats | None,
    loss: Callable[[Mapping[str, QuantizedLinear]], float],
    transform: WeightTransform | None,
) -> tuple[dict[str, QuantizedLinear], dict[str, float]]:
    """The int8 linears of one group, and what the algorithm chose."""
    prefix = block_prefix(index)
    weights, biases = {}, {}
    for member in group.members:
        weight, bias = array(f"{member}.weight"), array(f"{member}.bias")
        assert weight is not None
        weights[member] = transform(prefix + member, weight, stats) if transform else weight
        if bias is not None:
            biases[member] = bias
    problem = Problem(
        name=f"{prefix}{group.fused}",
        scheme=plan.scheme,
        weights=weights,
        biases=biases,
        stats=stats,
        dtype=plan.dtype,
        loss=loss,
        alpha=plan.alpha,
    )
    solution = get_algorithm(plan.algorithm, plan.scheme).solve(problem)
    return apply(problem, solution), dict(solution.note)


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
            found, _ = quantize_group(plan, index, group, array, None, _no_loss, None)
            linears.update(found)
            progress(index, (done + 1) / len(groups))
        job.finish_block(index, linears, {}, {})


def _no_loss(candidate: Mapping[str, QuantizedLinear]) -> float:
    raise AssertionError("an algorithm without calibration asked for a loss")
