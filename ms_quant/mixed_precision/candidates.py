"""From an analysis to parts that one price divides a budget among."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ms_quant.allocation.options import Options, all_prices
from ms_quant.allocation.price import Point
from ms_quant.analysis.records import Sensitivity
from ms_quant.mixed_precision.costs import FLOAT, Cost, all_weights
from ms_quant.models.names import GroupId

Choice = dict[GroupId, str]
"""Every group of a model to its scheme."""


@dataclass(frozen=True)
class Candidates:
    """What every group of a model can become.

    Attributes:
        costs: group to what it costs in each scheme that is open to it.
        losses: the same to the estimated increase of the loss.
        parts: text of a group's id to the ways that one price chooses from.
    """

    costs: Mapping[GroupId, Mapping[str, Cost]]
    losses: Mapping[GroupId, Mapping[str, float]]
    parts: Mapping[str, Options]

    def choice(self, ways: Mapping[str, str]) -> Choice:
        """The choice that has a way for each part."""
        return {group: ways[str(group)] for group in self.costs}

    def at(self, price: float) -> Choice:
        """What one price chooses."""
        return self.choice({name: part.choice(price) for name, part in self.parts.items()})

    def prices(self) -> list[float]:
        """The prices that lead to different choices, from the cheapest to the best."""
        return all_prices(self.parts.values())

    def loss(self, choice: Choice) -> float:
        """The estimated increase of the loss, of all groups together."""
        return math.fsum(self.losses[group][scheme] for group, scheme in choice.items())

    def stored(self, choice: Choice) -> int:
        """Bytes of all groups, scales and all."""
        return sum(self.costs[group][scheme].stored for group, scheme in choice.items())

    def bits(self, choice: Choice) -> float:
        """Stored bits of a weight, scales and all, in the mean over the weights of all groups."""
        chosen = [self.costs[group][scheme] for group, scheme in choice.items()]
        return sum(cost.bits for cost in chosen) / sum(cost.weights for cost in chosen)


def candidates(
    found: Sensitivity,
    costs: Mapping[GroupId, Mapping[str, Cost]],
    with_float: bool,
    spent: Callable[[Cost], float],
) -> Candidates:
    """What every group can become.

    Args:
        found: what each scheme does to it.
        costs: group to what it costs in each scheme that it can take, and in float.
        with_float: whether groups that can take a scheme may stay float.
        spent: what is spent of the budget, of a cost; of all groups together it is a mean over
            weights.
    """
    measured = {GroupId(group.block, group.name): group for group in found.groups}
    losses: dict[GroupId, dict[str, float]] = {}
    for group, known in costs.items():
        own = measured.get(group)
        schemes = [name for name in known if own is not None and name in own.schemes]
        losses[group] = {name: own.score(name, "loss_increase") for name in schemes} if own else {}
        if with_float or not schemes:
            losses[group][FLOAT] = 0.0
    left = {
        group: {name: cost for name, cost in known.items() if name in losses[group]}
        for group, known in costs.items()
    }
    weights = all_weights(costs)
    parts = {
        str(group): Options(
            {
                name: Point(spent(cost) / weights, losses[group][name])
                for name, cost in known.items()
            }
        )
        for group, known in left.items()
    }
    return Candidates(left, losses, parts)
