"""Int8 weights of which nearly all need four bits: what a compressor makes small.

The scale of a row is the largest magnitude of its weights that are no outliers, divided by 7. Codes
are int8 all the same, from -127 to 127, so an outlier keeps its value up to 127 scales. Outliers:

* ``sigma`` k: |w| above k standard deviations of |w| in its row (of |w|, not of w);
* else ``fraction`` f: |w| above the int(n f)-th largest of its row, of n weights;
* with ``whole``: above the int(n f)-th largest of the whole tensor, of n weights.

No data is looked at. Source: msModelSlim's W8A8S (``is_lowbit``, ``co_sparse``), as
docs/algorithms.md states it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from ms_quant.algorithms.problem import Problem, Solution, checked, grid_of
from ms_quant.numerics.grid import AffineGrid, stored_scale

LARGEST, FARTHEST = 7, 127  # codes: of four bits, and of an outlier


@dataclass(frozen=True)
class LowBitsOptions:
    """Attributes:
    fraction: share of the weights that are outliers.
    sigma: standard deviations above which a weight is one; 0 takes the fraction.
    whole: the fraction is of the whole tensor, not of each row.
    """

    fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.01
    sigma: Annotated[float, Field(ge=0, le=100)] = 0.0
    whole: bool = False


def largest_inlier(weight: np.ndarray, options: LowBitsOptions) -> np.ndarray:
    """float32 (out, 1): the largest magnitude of a row without its outliers.

    Where all of a row are outliers, its largest magnitude of all.

    Args:
        weight: float32 (out, in).
        options: which weights are outliers.
    """
    size = np.abs(weight)
    if options.sigma:
        spread = size.std(axis=1, ddof=1 if size.shape[1] > 1 else 0, keepdims=True)
        limit = np.float32(options.sigma) * spread
    elif options.whole:
        limit = _nth_largest(size.reshape(1, -1), options.fraction)
    else:
        limit = _nth_largest(size, options.fraction)
    inside = np.where(size <= limit, size, 0).max(axis=1, keepdims=True, initial=0)
    return np.where(inside > 0, inside, size.max(axis=1, keepdims=True, initial=0))


def _nth_largest(size: np.ndarray, fraction: float) -> np.ndarray:
    """(rows, 1): the int(n fraction)-th largest of each row of n, at least the largest."""
    count = size.shape[1]
    place = max(1, int(count * fraction))
    return np.partition(size, count - place, axis=1)[:, count - place, None]


def solve(problem: Problem, solution: Solution, options: LowBitsOptions) -> Solution:
    grids, codes = {}, {}
    for name, weight in checked(problem, solution).items():
        grid = grid_of(problem, replace(solution, clip={}), name, weight)
        assert isinstance(grid, AffineGrid)
        inside = largest_inlier(weight, options)
        scale = stored_scale(inside / np.float32(LARGEST), grid.scale_dtype, grid.name)
        grids[name] = replace(grid, scale=np.where(inside > 0, scale, grid.scale))
        codes[name] = np.maximum(grids[name].round(weight), -FARTHEST).astype(np.int8)
    return replace(solution, grids=grids, codes=codes)
