"""A part of a model that can be had in a few ways."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise

from ms_quant.allocation.price import Point


class Options:
    """A part that can be had in a few ways, each at a cost and with a loss.

    Only those on the lower convex hull are ever worth a price.

    Args:
        points: name of a way to what it costs and loses; of equal ones the first counts.

    Attributes:
        hull: names of the ways that some price chooses, the cheapest first.
        points: name to cost and loss.
    """

    def __init__(self, points: Mapping[str, Point]):
        self.points = dict(points)
        order = sorted(self.points, key=lambda name: self.points[name])
        self.hull: list[str] = []
        for name in order:
            if self.hull and self.points[name].loss >= self.points[self.hull[-1]].loss:
                continue
            while len(self.hull) > 1 and self.rate(self.hull[-1], name) >= self.rate(
                self.hull[-2], self.hull[-1]
            ):
                self.hull.pop()
            self.hull.append(name)

    def rate(self, cheaper: str, better: str) -> float:
        """How much less is lost for each unit that is spent more."""
        low, high = self.points[cheaper], self.points[better]
        return (low.loss - high.loss) / (high.cost - low.cost)

    def prices(self) -> list[float]:
        """The prices at which another way is chosen, falling: at or below each a better one."""
        return [self.rate(*pair) for pair in pairwise(self.hull)]

    def choice(self, price: float) -> str:
        """The way that is chosen at a price."""
        return self.hull[sum(rate >= price for rate in self.prices())]

    def at(self, price: float) -> Point:
        """What is chosen at a price costs and loses so much."""
        return self.points[self.choice(price)]


def all_prices(parts: Iterable[Options]) -> list[float]:
    """The prices that lead to different choices, falling: from the cheapest to the best."""
    return [math.inf, *sorted({price for part in parts for price in part.prices()}, reverse=True)]
