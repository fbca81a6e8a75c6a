"""The cheapest choice whose measured loss is within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MOST_TRIALS = 8
CLOSE = 0.9
"""A trial is near enough to the budget when it uses this much of it."""


def cheapest_within(
    estimates: Sequence[float], budget: float, measure: Callable[[int], float]
) -> tuple[int, dict[int, float]]:
    """The first choice of a row whose measured loss is within the budget.

    The losses fall along the row as their estimates do. How far an estimate is off says the trial
    nearest to it.

    Args:
        estimates: of each choice, from the cheapest to the best, falling.
        budget: the largest increase of the loss, positive.
        measure: the increase of a choice, by its place.

    Returns:
        The place, ``len(estimates)`` where none is within, and what was measured at which places.
    """
    over, within = -1, len(estimates)
    found: dict[int, float] = {}
    for _ in range(MOST_TRIALS):
        if within - over <= 1:
            break
        place = _next(estimates, budget, found, over, within)
        found[place] = measure(place)
        if found[place] > budget:
            over = place
        else:
            within = place
            if found[place] >= CLOSE * budget:
                break
    return within, found


def _next(
    estimates: Sequence[float], budget: float, found: dict[int, float], over: int, within: int
) -> int:
    """The place to try: where the estimates, put right, meet the budget."""
    between = range(over + 1, within)
    low, high = found.get(over), found.get(within)
    if low is None and high is None:
        return _first(estimates, budget, between)
    if low is not None and high is not None and estimates[over] > estimates[within]:
        part = (low - budget) / (low - high)
        wanted = estimates[over] + part * (estimates[within] - estimates[over])
        wanted = min(wanted, 0.9 * estimates[over] + 0.1 * estimates[within])
        wanted = max(wanted, 0.1 * estimates[over] + 0.9 * estimates[within])
        return _first(estimates, wanted, between)
    known = over if low is not None else within
    scale = found[known] / estimates[known] if estimates[known] else 0.0
    if scale <= 0:
        return between[len(between) // 2]
    return _first(estimates, budget / scale, between)


def _first(estimates: Sequence[float], wanted: float, between: range) -> int:
    """The first place between two others whose estimate is no more; the last one where none is."""
    return next((place for place in between if estimates[place] <= wanted), between[-1])
