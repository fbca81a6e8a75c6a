"""OutlierSuppressionLite: the smoothing strength of each linear is searched.

For each strength of a fixed grid the linears are quantized exactly as they will be deployed,
static activation scales included, and the one with the smallest error of the decoder block's
output wins, on tokens that its ranges were not made of; then each weight row's clipping factor is
searched, and kept if the block's error does not grow. No smoothing is a candidate too.

Source: docs/algorithms.md, "OutlierSuppressionLite"; the smoothing formula is SmoothQuant's.
"""

from __future__ import annotations

from dataclasses import replace

from ms_quant.algorithms import clip
from ms_quant.algorithms.problem import Problem, Solution, apply, noted
from ms_quant.algorithms.smooth import smoothing_vector

ALPHAS = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


def solve(problem: Problem, solution: Solution, options: None = None) -> Solution:
    trial = problem.held_out()
    best, best_mse = solution, problem.mse(apply(trial, solution))
    for alpha in ALPHAS if problem.smoothing else ():
        candidate = replace(solution, smooth=smoothing_vector(trial, alpha))
        mse = problem.mse(apply(trial, candidate))
        if mse < best_mse:
            whole = replace(solution, smooth=smoothing_vector(problem, alpha))
            best, best_mse = noted(whole, alpha=alpha), mse
    if trial is not problem:
        best_mse = problem.mse(apply(problem, best))
    if problem.scheme.weight.clips:
        clipped = clip.solve(problem, best)
        mse = problem.mse(apply(problem, clipped))
        if mse <= best_mse:  # the clip search sees one linear, not the block
            best, best_mse = clipped, mse
    return noted(best, loss=best_mse)
