"""How large the input of a group is, before and after smoothing, for records and reports."""

from __future__ import annotations

from typing import Any

import numpy as np

from ms_quant.algorithms.problem import Problem, Solution, smoothing

OUTLIER = 20.0
"""Times the median channel from which a channel is an outlier: int8 then has 6 steps left for the
median one."""
NAMED = 4


def input_facts(problem: Problem, solution: Solution) -> dict[str, Any]:
    """The largest magnitudes that calibration has seen; {} where nothing was seen.

    Returns:
        JSON: ``before`` and ``after`` smoothing ``[largest channel, median channel]``, the latter
        only where a vector divides the input and nothing rotates it; ``outliers``, how many
        channels are outliers before; and ``channels``, the largest of these as
        ``[channel, before, after]``.
    """
    if problem.stats is None or not problem.stats.tokens:
        return {}
    before = problem.stats.absmax
    middle = float(np.median(before))
    outliers = np.flatnonzero(before > OUTLIER * middle) if middle else np.zeros(0, int)
    worst = outliers[np.argsort(-before[outliers], kind="stable")][:NAMED]
    smooth = smoothing(problem, solution)
    # A static scale alone is held as a vector of one value, which smooths nothing.
    smooths = smooth is not None and bool(np.ptp(smooth))
    after = before / smooth if smooths and solution.kronecker is None else None
    facts: dict[str, Any] = {"before": [_short(before.max()), _short(middle)]}
    if after is not None:
        facts["after"] = [_short(after.max()), _short(np.median(after))]
    facts["outliers"] = len(outliers)
    facts["channels"] = [
        [int(c), _short(before[c]), None if after is None else _short(after[c])] for c in worst
    ]
    return facts


def _short(value: Any) -> float:
    return float(f"{float(value):.4g}")
