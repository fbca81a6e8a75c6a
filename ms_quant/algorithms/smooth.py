"""SmoothQuant: moves part of the activations' range into the weights.

Source: Xiao et al., arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated

import numpy as np
from pydantic import Field

from ms_quant.algorithms.problem import InputMaxima, Problem, Solution, noted


@dataclass(frozen=True)
class SmoothOptions:
    """Attributes:
    alpha: strength; 0 leaves the range with the activations, 1 moves all of it to the weights.
    only: glob pattern of the linears that are smoothed, with those that read the same input.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    only: str = "*"


def smooth_scale(
    act_absmax: np.ndarray, weight_absmax: np.ndarray, alpha: float, beta: float | None = None
) -> np.ndarray:
    """s_j = max|X_j|^alpha / max|W_j|^beta.

    Args:
        act_absmax: (in,), largest magnitude of each input channel.
        weight_absmax: (in,), largest magnitude of each weight column.
        alpha: 0 leaves the range with the activations, 1 moves all of it to the weights.
        beta: the same of the weights' range; None is 1 - alpha.

    Returns:
        float32 (in,), at least 1e-5; 1 where either maximum is 0.
    """
    act = np.asarray(act_absmax, np.float64)
    weight = np.asarray(weight_absmax, np.float64)
    live = (act > 0) & (weight > 0)
    beta = 1.0 - alpha if beta is None else beta
    scale = np.where(live, act, 1.0) ** alpha / np.where(live, weight, 1.0) ** beta
    return np.where(live, np.maximum(scale, 1e-5), 1.0).astype(np.float32)


def weight_absmax(weights) -> np.ndarray:
    """(in,), largest magnitude of each column over all the linears of a group."""
    return np.max([np.abs(weight).max(axis=0, initial=0) for weight in weights], axis=0)


def smoothing_vector(problem: Problem, alpha: float) -> np.ndarray:
    """float32 (in,) of a problem's linears together."""
    act = problem.share(problem.seen.absmax)
    columns = problem.share(weight_absmax(problem.weights.values()))
    return smooth_scale(act, columns, alpha)


def solve(problem: Problem, solution: Solution, options: SmoothOptions) -> Solution:
    if not problem.smoothing or not _wanted(problem.weights, options):
        return solution
    smooth = smoothing_vector(problem, options.alpha)
    return noted(replace(solution, smooth=smooth), alpha=options.alpha)


def of_maxima(names: Sequence[str], maxima: InputMaxima, options: SmoothOptions) -> Solution:
    """The same of an input that experts read."""
    if not _wanted(names, options):
        return Solution()
    smooth = smooth_scale(maxima.activations, maxima.columns, options.alpha)
    return noted(Solution(smooth), alpha=options.alpha)


def _wanted(names: Iterable[str], options: SmoothOptions) -> bool:
    return any(fnmatchcase(name, options.only) for name in names)
