"""Smoothing whose strengths for inputs and for weights are searched apart.

s_j = max|X_j|^alpha / max|W_j|^beta. First alpha with beta = 1 - alpha, over steps of 0.05; then
beta over the same steps with that alpha. The best has the least error of the group's own outputs
on the kept calibration tokens, ||y_q - y|| / ||y|| over all linears together, everything quantized
as it will be deployed. Unlike OutlierSuppressionLite's it asks for no forward of the block.

Source: msModelSlim 26.1 ``flex_smooth_quant``, whose candidates are rounded to int8 whatever the
scheme; docs/algorithms.md states it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from ms_quant.algorithms.problem import InputMaxima, Problem, Solution, apply, noted
from ms_quant.algorithms.smooth import smooth_scale, weight_absmax

STEPS = 20
GRID = tuple(step / STEPS for step in range(STEPS + 1))
Strength = Annotated[float, Field(ge=0, le=1)] | None


@dataclass(frozen=True)
class FlexSmoothOptions:
    """Attributes:
    alpha: strength of the inputs' range; None is searched.
    beta: strength of the weights' range; None is searched.
    """

    alpha: Strength = None
    beta: Strength = None


def solve(problem: Problem, solution: Solution, options: FlexSmoothOptions) -> Solution:
    if not problem.smoothing:
        return solution
    act = problem.share(problem.seen.absmax)
    columns = problem.share(weight_absmax(problem.weights.values()))

    def smoothed(alpha: float, beta: float) -> Solution:
        return replace(solution, smooth=smooth_scale(act, columns, alpha, beta))

    error = output_error(problem)
    alpha, beta = search(lambda a, b: error(smoothed(a, b)), options)
    return noted(smoothed(alpha, beta), alpha=alpha, beta=beta)


def of_maxima(names: Sequence[str], maxima: InputMaxima, options: FlexSmoothOptions) -> Solution:
    """The same of an input that experts read, where nothing is searched."""
    alpha, beta = options.alpha, options.beta
    if alpha is None or beta is None:
        return Solution()
    smooth = smooth_scale(maxima.activations, maxima.columns, alpha, beta)
    return noted(Solution(smooth), alpha=alpha, beta=beta)


def search(
    error: Callable[[float, float], float], options: FlexSmoothOptions
) -> tuple[float, float]:
    """The pair of least error; of equal ones the smallest strengths.

    Args:
        error: of a pair.
        options: what is given is not searched.
    """
    alpha, beta = options.alpha, options.beta
    if alpha is None:
        alpha = min(GRID, key=lambda a: error(a, 1 - a if beta is None else beta))
    if beta is None:
        first = 1 - alpha
        beta = min((first, *GRID), key=lambda b: error(alpha, b))
    return alpha, beta


def output_error(problem: Problem) -> Callable[[Solution], float]:
    """Gives the relative error of a group's outputs under a solution."""
    x = problem.seen.rows
    exact = {name: x @ weight.T for name, weight in problem.weights.items()}
    size = sum(float(np.square(y, dtype=np.float64).sum()) for y in exact.values()) or 1.0

    def error(solution: Solution) -> float:
        wrong = 0.0
        for name, linear in apply(problem, solution).items():
            found = replace(linear, bias=None).forward(x)
            wrong += float(np.square(found - exact[name], dtype=np.float64).sum())
        return wrong / size

    return error
