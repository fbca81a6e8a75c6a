"""AWQ: input channels with large activations are scaled up in the weight before it is rounded.

For each exponent a of a grid the weights' columns are multiplied by

    s_j = mean|x_j|^a / (w_j^(1 - a) + 1e-4)      (duo scaling; else mean|x_j|^a)

with w_j the mean over rows of |W_ij| relative to the largest magnitude of its group, normalised by
sqrt(max s * min s), and the exponent with the smallest error of the decoder block's output wins;
then the ranges of the weights are clipped, those of queries and keys aside. No scaling
is a candidate, too.

Source: Lin et al., arXiv 2306.00978; duo scaling as in its reference code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from ms_quant.algorithms import clip
from ms_quant.algorithms.problem import Problem, Solution, apply, noted

SMALLEST = 1e-4


@dataclass(frozen=True)
class AwqOptions:
    """Attributes:
    exponents: how many exponents are tried: 0, 1/n, ..., (n - 1)/n.
    duo_scaling: divide by the weights' share, too.
    clip: search clipping factors afterwards.
    """

    exponents: Annotated[int, Field(ge=1, le=100)] = 20
    duo_scaling: bool = True
    clip: bool = True


def weight_share(weights: Mapping[str, np.ndarray], group: int) -> np.ndarray:
    """w_j: float32 (in,), the mean over the rows of all linears of |W| relative to its group.

    Args:
        weights: float32 (out, in) each.
        group: inputs of a group; 0 for whole rows.
    """
    stacked = np.abs(np.concatenate(list(weights.values())))
    rows, columns = stacked.shape
    groups = stacked.reshape(rows, -1, group or columns)
    largest = groups.max(axis=2, keepdims=True, initial=0)
    share = groups / np.where(largest > 0, largest, 1)
    return share.reshape(rows, columns).mean(axis=0, dtype=np.float64).astype(np.float32)


def scale(mean_abs: np.ndarray, share: np.ndarray, exponent: float, duo: bool) -> np.ndarray:
    """The factor on each column, float32 (in,), positive.

    Args:
        mean_abs: float32 (in,), mean |x| of each channel.
        share: of :func:`weight_share`.
        exponent: a, 0 to 1.
        duo: whether the weights' share divides.
    """
    s = np.asarray(mean_abs, np.float64) ** exponent
    if duo:
        s = s / (np.asarray(share, np.float64) ** (1 - exponent) + SMALLEST)
    s = np.maximum(s, SMALLEST)
    return (s / np.sqrt(s.max(initial=SMALLEST) * s.min(initial=np.inf))).astype(np.float32)


def solve(problem: Problem, solution: Solution, options: AwqOptions) -> Solution:
    trial = problem.held_out()
    best, best_mse = solution, problem.mse(apply(trial, solution))
    mean_abs = problem.share(problem.seen.mean_abs)
    share = problem.share(weight_share(problem.weights, problem.scheme.weight.group_size))
    for step in range(options.exponents if problem.smoothing else 0):
        exponent = step / options.exponents
        smooth = scale(mean_abs, share, exponent, options.duo_scaling)
        candidate = replace(solution, smooth=smooth)
        mse = problem.mse(apply(trial, candidate))
        if mse < best_mse:
            best, best_mse = noted(candidate, exponent=exponent), mse
    if options.clip and problem.scheme.weight.clips:
        best = clip.solve(problem, best, skip=problem.scores)
    return noted(best, loss=best_mse)
