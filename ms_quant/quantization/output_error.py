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

TOKENS = 64  # enough for a mean of relative errors; more would slow down calibration


def output_error(problem: Problem, linears: Mapping[str, QuantizedLinear]) -> float | None:
    """The relative error of a group's outputs, in the mean over some of the kept tokens.

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
    rows = np.ascontiguousarray(rows[:: -(-len(rows) // TOKENS)])
    exact, made, decoded = [], [], []
    for name, linear in linears.items():  # one at a time: what it computes with takes memory
        forward = QuantizedForward(replace(linear, bias=None))
        exact.append(kernels.matmul(rows, problem.weights[name]))
        made.append(forward(rows))
        decoded.append(forward(rows, decode=True) if forward.phased else made[-1])
    joined = np.concatenate(exact, axis=-1)
    return max(errors(np.concatenate(one, axis=-1), joined)[0] for one in (made, decoded))
