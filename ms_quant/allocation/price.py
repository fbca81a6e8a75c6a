"""One price for all parts of a model: what costs least where the loss is given, or the reverse.

Each part can be had at several costs with several losses, which add up. Where all parts pay the
same price for a unit of cost, no other division has less loss at the same cost (Everett, Operations
Research 11, 1963).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from decimal import ROUND_CEILING, Context
from typing import NamedTuple, Protocol

import numpy as np

LOWEST, HIGHEST = 2.0**-40, 2.0**20
SEARCH_STEPS = 60
SIX_DIGITS = Context(prec=6, rounding=ROUND_CEILING)
"""Prices are rounded up to them: the last ones differ between processors."""


class Point(NamedTuple):
    """Attributes:
    cost: in the unit that the budget has.
    loss: how much worse the model becomes.
    """

    cost: float
    loss: float


class Priced(Protocol):
    """A part of a model."""

    def at(self, price: float) -> Point:
        """What it becomes where a unit of cost is worth ``price`` of loss."""


def total(parts: Iterable[Priced], price: float) -> Point:
    """The sums over all parts at a price."""
    cost = loss = 0.0
    for part in parts:
        own = part.at(price)
        cost, loss = cost + own.cost, loss + own.loss
    return Point(cost, loss)


def price_for_cost(parts: Iterable[Priced], cost: float) -> float:
    """The least price at which no more is spent; the highest where none is."""
    parts = list(parts)
    return _least_price(lambda price: total(parts, price).cost <= cost)


def price_for_loss(parts: Iterable[Priced], loss: float) -> float:
    """The least price at which so much is lost; the highest where none is."""
    parts = list(parts)
    return _least_price(lambda price: total(parts, price).loss >= loss)


def _least_price(enough: Callable[[float], bool]) -> float:
    low, high = np.log(LOWEST), np.log(HIGHEST)
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(float(np.exp(middle))) else (middle, high)
    return float(SIX_DIGITS.create_decimal(float(np.exp(high))))
