"""How a budget is divided among the linears of a model.

Each linear has a curve: its relative error and its size at some prices of a bit. With a
sensitivity c, the relative MSE of the model is taken as the sum of c * error. The least one for a
size has one price for all: a linear of n of the model's N weights pays ``price * n / (N * c)`` of
its relative error for a bit per weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ms_quant.allocation.price import HIGHEST, Point, price_for_cost, price_for_loss, total
from ms_quant.errors import BadArgumentError

PRICES = tuple(2.0**power for power in range(-13, -1))
"""Of a bit per weight, in relative error, at which a linear is measured."""


class Curve(NamedTuple):
    """What a linear costs at each of PRICES.

    Attributes:
        weights: how many it has.
        sensitivity: relative MSE for its relative error.
        errors: relative errors.
        ratios: stored bytes over weights.
    """

    weights: int
    sensitivity: float
    errors: tuple[float, ...]
    ratios: tuple[float, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Curve:
        """The curve that a note holds.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: it holds none.
        """
        errors, ratios = (tuple(map(float, value[key])) for key in ("errors", "ratios"))
        weights, sensitivity = int(value["weights"]), float(value["sensitivity"])
        numbers = (weights, sensitivity, *ratios, *(1 + error for error in errors))
        good = all(math.isfinite(number) and number > 0 for number in numbers)
        if not good or not len(errors) == len(ratios) == len(PRICES):
            raise ValueError
        return cls(weights, sensitivity, errors, ratios)


class Prediction(NamedTuple):
    """Attributes:
    ratio: stored bytes over weights of all linears.
    relative_mse: sum of sensitivity times relative error.
    """

    ratio: float
    relative_mse: float


class _Share(NamedTuple):
    """A linear as one of all.

    Attributes:
        curve: of the linear.
        weights: how many all linears have.
    """

    curve: Curve
    weights: int

    def local_price(self, price: float) -> float:
        """What it pays for a bit per weight, in its relative error."""
        wanted = price * self.curve.weights / (self.weights * self.curve.sensitivity)
        return min(max(wanted, PRICES[0]), PRICES[-1])

    def at(self, price: float) -> Point:
        """Its stored bytes and its part of the relative MSE, from the curve."""
        curve, at = self.curve, np.log(self.local_price(price))
        ratio = float(np.interp(at, np.log(PRICES), curve.ratios))
        error = np.exp(np.interp(at, np.log(PRICES), np.log(np.maximum(curve.errors, 1e-30))))
        return Point(curve.weights * ratio, curve.sensitivity * float(error))


def _shares(curves: Mapping[str, Curve]) -> dict[str, _Share]:
    weights = _weights(curves)
    return {name: _Share(curve, weights) for name, curve in curves.items()}


def _weights(curves: Mapping[str, Curve]) -> int:
    return sum(curve.weights for curve in curves.values())


def local_prices(curves: Mapping[str, Curve], price: float) -> dict[str, float]:
    """What each linear pays for a bit per weight, in its relative error.

    Args:
        curves: of all linears, by name.
        price: relative MSE for a bit per weight of the whole model, positive.
    """
    return {name: share.local_price(price) for name, share in _shares(curves).items()}


def predict(curves: Mapping[str, Curve], price: float) -> Prediction:
    """What a price leads to, from the curves."""
    stored, relative_mse = total(_shares(curves).values(), price)
    return Prediction(stored / _weights(curves), relative_mse)


def price_for_ratio(curves: Mapping[str, Curve], ratio: float, aim: float = 1.0) -> float:
    """The least price at which no more is stored.

    Args:
        curves: of all linears.
        ratio: stored bytes over weights.
        aim: the part of it to aim at, where a price leads there.

    Raises:
        MsQuantError: no price leads to the ratio.
    """
    shares, weights = _shares(curves).values(), _weights(curves)
    least = total(shares, HIGHEST).cost
    if least / weights > ratio:
        raise BadArgumentError(
            f"target ratio {ratio:g} cannot be reached: the smallest that this model's linears "
            f"are predicted to take is {least / weights:.3f}"
        )
    return price_for_cost(shares, max(aim * ratio * weights, least))


def price_for_relative_mse(curves: Mapping[str, Curve], relative_mse: float) -> float:
    """The price at which the relative MSE is so much; the nearest where none is."""
    return price_for_loss(_shares(curves).values(), relative_mse)
