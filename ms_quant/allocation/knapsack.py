"""The choice that loses least within a budget, where parts are few and large.

A price divides a budget well where parts are many (``price.py``): what is left of the budget is
then nothing. Of some ten or hundred parts it may be much, and which of them are best together is
no question of the price alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ms_quant.allocation.options import Options

MOST_STATES = 4096
"""Sums of costs that are told apart."""
ROUNDING = 1e-12
"""By how much more than the budget, relatively, sums may be: they are rounded."""


def best_within(parts: Mapping[str, Options], budget: float) -> dict[str, str]:
    """A way for each part, with the least loss of all that cost no more than a budget.

    Part by part, of the sums so far those are dropped that cost as much as another and lose no less
    (Nemhauser and Ullmann, Management Science 15, 1969). That is exact; where more than
    ``MOST_STATES`` are left, the best of each range of costs stay.

    Args:
        parts: name to part.
        budget: what all may cost; the cheapest ways are chosen where these cost more.
    """
    points = [np.array(list(part.points.values())) for part in parts.values()]
    least = np.array([own[:, 0].min() for own in points])
    limit = max(budget * (1 + ROUNDING), math.fsum(least) * (1 + ROUNDING))
    front, steps = np.zeros((1, 2)), []
    for k, own in enumerate(points):
        sums = (front[:, None] + own).reshape(-1, 2)
        kept = _undominated(sums, limit - math.fsum(least[k + 1 :]))
        steps.append(kept)
        front = sums[kept]
    chosen, state = {}, len(front) - 1
    for (name, part), kept in reversed(list(zip(parts.items(), steps, strict=True))):
        state, way = divmod(int(kept[state]), len(part.points))
        chosen[name] = list(part.points)[way]
    return {name: chosen[name] for name in parts}


def _undominated(sums: np.ndarray, most: float) -> np.ndarray:
    """Which sums of (cost, loss) no other betters, the cheapest first; a few thousand at most."""
    order = np.lexsort((sums[:, 1], sums[:, 0]))
    order = order[sums[order, 0] <= most]
    losses = sums[order, 1]
    before = np.minimum.accumulate(np.concatenate([[math.inf], losses[:-1]]))
    kept = order[losses < before]
    if len(kept) <= MOST_STATES:
        return kept
    costs = sums[kept, 0]
    ranges = ((costs - costs[0]) / (costs[-1] - costs[0]) * MOST_STATES).astype(np.int64)
    return kept[np.append(ranges[1:] > ranges[:-1], True)]
