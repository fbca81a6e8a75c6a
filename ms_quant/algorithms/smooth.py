"""SmoothQuant: moves part of the activations' range into the weights.

Source: Xiao et al., arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

import numpy as np

from ms_quant.algorithms.problem import Problem, Solution
from ms_quant.errors import MsQuantError


def check_alpha(alpha: float) -> None:
    """Refuses a smoothing strength out of range.

    Raises:
        MsQuantError: it is not a number from 0 to 1.
    """
    if not 0.0 <= alpha <= 1.0:
        raise MsQuantError(f"alpha is {alpha}, expected a number from 0 to 1")


def smooth_scale(act_absmax: np.ndarray, weight_absmax: np.ndarray, alpha: float) -> np.ndarray:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha).

    Args:
        act_absmax: (in,), largest magnitude of each input channel.
        weight_absmax: (in,), largest magnitude of each weight column.
        alpha: 0 leaves the range with the activations, 1 moves all of it to the weights.

    Returns:
        float32 (in,), at least 1e-5; 1 where either maximum is 0.
    """
    act = np.asarray(act_absmax, np.float64)
    weight = np.asarray(weight_absmax, np.float64)
    live = (act > 0) & (weight > 0)
    scale = np.where(live, act, 1.0) ** alpha / np.where(live, weight, 1.0) ** (1.0 - alpha)
    return np.where(live, np.maximum(scale, 1e-5), 1.0).astype(np.float32)


def weight_absmax(weights) -> np.ndarray:
    """(in,), largest magnitude of each column over all the linears of a group."""
    return np.max([np.abs(weight).max(axis=0, initial=0) for weight in weights], axis=0)


def solve(problem: Problem) -> Solution:
    assert problem.stats is not None
    columns = weight_absmax(problem.weights.values())
    smooth = smooth_scale(problem.stats.absmax, columns, problem.alpha)
    return Solution(smooth, note={"alpha": problem.alpha})
