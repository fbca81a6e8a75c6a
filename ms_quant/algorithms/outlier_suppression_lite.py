"""OutlierSuppressionLite: the smoothing strength of each linear is searched.

For each strength of a fixed grid the linears are quantized exactly as they will be deployed,
static activation scales included, and the one with the smallest error of the decoder block's
output wins; then each weight row's clipping factor is searched, and kept if the block's error
does not grow. No smoothing is a candidate too, so the result is never worse than min-max by its
own measure.

Source: docs/algorithms.md, "OutlierSuppressionLite"; the smoothing formula is SmoothQuant's.
"""

from __future__ import annotations

from ms_quant.algorithms.clip import search_clip
from ms_quant.algorithms.problem import Problem, Solution, apply
from ms_quant.algorithms.smooth import smooth_scale, weight_absmax

ALPHAS = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


def solve(problem: Problem) -> Solution:
    assert problem.stats is not None
    columns = weight_absmax(problem.weights.values())
    best, best_loss = Solution(), problem.loss(apply(problem, Solution()))
    for alpha in ALPHAS:
        smooth = smooth_scale(problem.stats.absmax, columns, alpha)
        candidate = Solution(smooth, note={"alpha": alpha})
        loss = problem.loss(apply(problem, candidate))
        if loss < best_loss:
            best, best_loss = candidate, loss
    clipped = Solution(best.smooth, _clip(problem, best), best.note)
    loss = problem.loss(apply(problem, clipped))
    if loss <= best_loss:  # the clip search sees one linear, not the block
        best, best_loss = clipped, loss
    return Solution(best.smooth, best.clip, {**best.note, "loss": best_loss})


def _clip(problem: Problem, solution: Solution) -> dict:
    assert problem.stats is not None
    activation = next(iter(apply(problem, solution).values())).activation
    assert activation is not None
    inputs = problem.stats.rows / activation.smooth
    return {
        name: search_clip(weight * activation.smooth, inputs)
        for name, weight in problem.weights.items()
    }
