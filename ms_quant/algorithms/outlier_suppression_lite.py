"""OutlierSuppressionLite: the smoothing strength of each linear is searched.

For each strength of a fixed grid the linears are quantized exactly as they will be deployed,
static activation scales included, and the one with the smallest error of the decoder block's
output wins, on tokens that its ranges were not made of; then each weight row's clipping factor is
searched, and kept if the block's error does not grow. No smoothing is a candidate too.

Where ranges of inputs are static the error is that of tokens, and no channel is left with a range
that large tokens are above of: see :func:`with_room`.

Source: docs/algorithms.md, "OutlierSuppressionLite"; the smoothing formula is SmoothQuant's.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ms_quant.algorithms import clip
from ms_quant.algorithms.problem import Problem, Solution, apply, noted
from ms_quant.algorithms.smooth import smoothing_vector

ALPHAS = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
ROOM = 0.9


def solve(problem: Problem, solution: Solution, options: None = None) -> Solution:
    trial, static = problem.held_out(), problem.scheme.needs_calibration
    error = problem.token_error if static and problem.token_error else problem.mse
    best, least = solution, error(apply(trial, solution))
    for alpha in ALPHAS if problem.smoothing else ():
        candidate = replace(solution, smooth=_vector(trial, alpha))
        found = error(apply(trial, candidate))
        if found < least:
            whole = replace(solution, smooth=_vector(problem, alpha))
            best, least = noted(whole, alpha=alpha), found
    if trial is not problem:
        least = error(apply(problem, best))
    if problem.scheme.weight.clips:
        clipped = clip.solve(problem, best)
        found = error(apply(problem, clipped))
        if found <= least:  # the clip search sees one linear, not the block
            best, least = clipped, found
    return noted(best, loss=least)


def _vector(problem: Problem, alpha: float) -> np.ndarray:
    smooth = smoothing_vector(problem, alpha)
    return with_room(problem, smooth) if problem.scheme.needs_calibration else smooth


def with_room(problem: Problem, smooth: np.ndarray) -> np.ndarray:
    """A smoothing vector nowhere so small that a large value of another channel would be clipped.

    Some channels are quiet for thousands of tokens and then carry half of a token's output. Their
    own largest value says nothing; what says something are the largest values of tokens, in
    whatever channel: all but a tenth of those fit the range of each channel. Values count relative
    to their channel's mean, where that is above the median channel's: channels that are large in
    every token say nothing of the others.

    Args:
        problem: its statistics are looked at.
        smooth: float32 (in,).
    """
    seen, level = problem.seen, problem.seen.mean_abs.astype(np.float64)
    usual = np.median(level)
    if not usual > 0 or not len(seen.rows):
        return smooth
    level = np.maximum(level / usual, 1)
    large = np.quantile((np.abs(seen.rows) / level).max(axis=1), ROOM)
    range_ = (seen.absmax / smooth).max()  # of the input after smoothing
    return np.maximum(smooth, problem.share(large * level / range_)).astype(np.float32)
