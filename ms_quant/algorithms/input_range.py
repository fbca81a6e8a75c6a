"""Static input ranges that leave out the outermost values.

The range is that of all channels and tokens together, so it does not combine with smoothing.

Source: docs/algorithms.md; the search is msModelSlim's ``histogram``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from ms_quant.algorithms.problem import Problem, Solution


@dataclass(frozen=True)
class PercentileOptions:
    """Attributes:
    share: of the values that the range holds.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.9999


def solve_histogram(problem: Problem, solution: Solution, options: None = None) -> Solution:
    assert problem.seen.histogram is not None
    return _with_range(solution, *problem.seen.histogram.least_error_range())


def solve_percentile(problem: Problem, solution: Solution, options: PercentileOptions) -> Solution:
    assert problem.seen.histogram is not None
    return _with_range(solution, *problem.seen.histogram.percentile_range(options.share))


def _with_range(solution: Solution, low: np.float32, high: np.float32) -> Solution:
    bounds = float(low), float(high)
    return replace(solution, input_range=bounds, note={**solution.note, "range": list(bounds)})
