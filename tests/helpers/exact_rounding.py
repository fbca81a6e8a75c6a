"""Rounding that rounds nothing, so that what is done around it can be compared exactly."""

from __future__ import annotations

import numpy as np

from ms_quant.algorithms.problem import Problem, Solution, checked
from ms_quant.numerics.activation import Float
from ms_quant.numerics.linear import QuantizedLinear


class Exact:
    """A grid on which every weight is its own code."""

    group = 0

    def values(self, codes: np.ndarray, start: int = 0) -> np.ndarray:
        return codes


def keep(problem: Problem, solution: Solution) -> tuple[dict[str, QuantizedLinear], dict]:
    """For ``BlockHooks.rounding``: the smoothed weights as they are."""
    return {
        name: QuantizedLinear(weight, Exact(), problem.biases.get(name), Float(), solution.smooth)
        for name, weight in checked(problem, solution).items()
    }, {}
