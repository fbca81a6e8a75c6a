"""What quantizing a group of linears changes in what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ms_quant import kernels
from ms_quant.algorithms.problem import Problem
from ms_quant.models.linear_forward import QuantizedForward
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.statistics.errors import errors


def output_error(problem: Problem, linears: Mapping[str, QuantizedLinear]) -> float | None:
    """The relative error of a group's outputs, in the mean over the kept calibration tokens.

    Args:
        problem: the group.
        linears: its quantized linears, with the smoothing that their inputs still need.

    Returns:
        float, squared error over squared output of a token; in decode, where that is worse. None
        without calibration, and where nothing is rounded yet.
    """
    if problem.stats is None or not len(problem.stats.rows) or not linears:
        return None
    rows = problem.stats.rows
    exact = [kernels.matmul(rows, problem.weights[name]) for name in linears]
    made = [QuantizedForward(replace(linear, bias=None)) for linear in linears.values()]
    phases = (False, True) if any(one.phased for one in made) else (False,)
    return max(
        errors(_joined([one(rows, decode) for one in made]), _joined(exact))[0] for decode in phases
    )


def _joined(outputs: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(outputs, axis=-1)
