"""SSZ: the scale of each row, or group, is moved to where the weight's squared error is least.

From absmax / largest on, codes and scale are improved in turn: q = round(w / s), then
s = <w, q> / <q, q>, the least squares answer for these codes. A step is kept where it makes the
error smaller. It needs no calibration.

Source: msModelSlim's ``ssz``, as docs/algorithms.md states it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from ms_quant.algorithms.problem import Problem, Solution, checked, grid_of
from ms_quant.numerics.grid import AffineGrid
from ms_quant.numerics.storage import nearest

SMALLEST_CHANGE = 1e-10


@dataclass(frozen=True)
class SszOptions:
    """Attributes:
    steps: at most this many improvements.
    """

    steps: Annotated[int, Field(ge=1, le=1000)] = 20


def improve(weight: np.ndarray, grid: AffineGrid, steps: int = 20) -> AffineGrid:
    """A grid on which a weight has at most the squared error that it has on the given one.

    Args:
        weight: float32 (out, in).
        grid: symmetric, fitted to the weight.
        steps: at most this many improvements.
    """
    rows, count = grid.scale.shape
    groups = weight.reshape(rows, count, weight.shape[1] // count)
    best, error = grid, _errors(groups, weight, grid)
    scale = grid.scale
    for _ in range(steps):
        codes = replace(grid, scale=scale).round(weight).reshape(groups.shape).astype(np.float64)
        power = np.square(codes).sum(axis=2)
        ideal = (groups * codes).sum(axis=2) / np.where(power > 0, power, 1)
        moved = np.where(power > 0, nearest(ideal, grid.scale_dtype), scale).astype(np.float32)
        if np.abs(moved - scale).max(initial=0) < SMALLEST_CHANGE:
            break
        scale = moved
        found = _errors(groups, weight, replace(grid, scale=scale))
        better = found < error
        best = replace(grid, scale=np.where(better, scale, best.scale))
        error = np.minimum(found, error)
    return best


def _errors(groups: np.ndarray, weight: np.ndarray, grid: AffineGrid) -> np.ndarray:
    wrong = grid.values(grid.round(weight)).astype(np.float64) - weight
    return np.square(wrong).reshape(groups.shape).sum(axis=2)


def solve(problem: Problem, solution: Solution, options: SszOptions) -> Solution:
    grids = {}
    for name, weight in checked(problem, solution).items():
        grid = grid_of(problem, replace(solution, clip={}), name, weight)
        assert isinstance(grid, AffineGrid)
        grids[name] = improve(weight, grid, options.steps)
    return replace(solution, grids=grids)
