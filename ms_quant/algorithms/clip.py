"""Weight clipping: a smaller range for each group of a row, chosen by its own output error.

Source: the clip search of AWQ (Lin et al., arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace

import numpy as np

from ms_quant.algorithms.problem import Problem, Solution, checked, seen_inputs
from ms_quant.numerics.grid import AffineFormat, AffineGrid, Grid

RATIOS = tuple(round(1.0 - 0.05 * i, 2) for i in range(10))  # 1, 0.95, ..., 0.55
Fit = Callable[[np.ndarray, float], Grid]


def _per_channel(weight: np.ndarray, ratio: float) -> Grid:
    return AffineFormat().fit(weight, "weight", clip=ratio)


def search_clip(weight: np.ndarray, inputs: np.ndarray, fit: Fit = _per_channel) -> np.ndarray:
    """The clipping factor of each group of a row with the smallest output error.

    Args:
        weight: float32 (out, in), as it will be quantized (smoothing applied).
        inputs: float32 (tokens, in), as the linear will see them.
        fit: gives the grid of a weight whose ranges are multiplied by a factor; int8 per channel
            if not said otherwise.

    Returns:
        float32 (out, groups). The mean over tokens of (x . (dq(q(w)) - w))^2 over the inputs of a
        group is smallest, sums in float32; a tie goes to the larger factor. Where all rows have
        one scale it is the sum over the rows, and all have one factor.
    """
    size = fit(weight, 1.0).group or weight.shape[1]
    groups = max(1, weight.shape[1] // max(1, size))
    best = np.full((len(weight), groups), np.inf)
    chosen = np.ones((len(weight), groups), np.float32)
    for ratio in RATIOS:
        grid = fit(weight, ratio)
        error = grid.values(grid.round(weight)) - weight
        for group in range(groups):
            part = slice(group * size, (group + 1) * size)
            output = inputs[:, part] @ error[:, part].T
            loss = np.square(output).mean(axis=0, dtype=np.float64)
            if isinstance(grid, AffineGrid) and grid.format.per_tensor:
                loss = np.full_like(loss, loss.sum())
            better = loss < best[:, group]
            best[better, group] = loss[better]
            chosen[better, group] = ratio
    return chosen


def solve(
    problem: Problem, solution: Solution, options: None = None, skip: Container[str] = ()
) -> Solution:
    """Clips every linear of a group but those of ``skip``."""
    inputs, dtype = seen_inputs(problem, solution), problem.scale_dtype
    format = problem.scheme.weight
    clips = {
        name: search_clip(weight, inputs, lambda w, ratio: format.fit(w, "weight", dtype, ratio))
        for name, weight in checked(problem, solution).items()
        if name not in skip
    }
    return replace(solution, clip=clips)
