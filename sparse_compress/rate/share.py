"""How a budget is divided among the linears of a model.

Each linear has a curve: its relative error and its size at some prices of a bit. With a
sensitivity c, the relative MSE of the model is taken as the sum of c * error. The least one for a
size has one price for all: a linear of n of the model's N weights pays ``price * n / (N * c)`` of
its relative error for a bit per weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ms_quant.errors import BadArgumentError

PRICES = tuple(2.0**power for power in range(-13, -1))
"""Of a bit per weight, in relative error, at which a linear is measured."""
LOWEST, HIGHEST = 2.0**-40, 2.0**20
SEARCH_STEPS = 60
ROUNDED = 5e-7
"""Prices are rounded up to six digits: the last ones differ between processors."""


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


def local_prices(curves: Mapping[str, Curve], price: float) -> dict[str, float]:
    """What each linear pays for a bit per weight, in its relative error.

    Args:
        curves: of all linears, by name.
        price: relative MSE for a bit per weight of the whole model, positive.
    """
    total = sum(curve.weights for curve in curves.values())
    found = {}
    for name, curve in curves.items():
        wanted = price * curve.weights / (total * curve.sensitivity)
        found[name] = min(max(wanted, PRICES[0]), PRICES[-1])
    return found


def predict(curves: Mapping[str, Curve], price: float) -> Prediction:
    """What a price leads to, from the curves."""
    total = sum(curve.weights for curve in curves.values())
    stored = relative_mse = 0.0
    for name, local in local_prices(curves, price).items():
        curve, at = curves[name], np.log(local)
        stored += curve.weights * float(np.interp(at, np.log(PRICES), curve.ratios))
        error = np.exp(np.interp(at, np.log(PRICES), np.log(np.maximum(curve.errors, 1e-30))))
        relative_mse += curve.sensitivity * float(error)
    return Prediction(stored / total, relative_mse)


def price_for_ratio(curves: Mapping[str, Curve], ratio: float, aim: float = 1.0) -> float:
    """The least price at which no more is stored.

    Args:
        curves: of all linears.
        ratio: stored bytes over weights.
        aim: the part of it to aim at, where a price leads there.

    Raises:
        MsQuantError: no price leads to the ratio.
    """
    least = predict(curves, HIGHEST).ratio
    if least > ratio:
        raise BadArgumentError(
            f"target ratio {ratio:g} cannot be reached: the smallest that this model's linears "
            f"are predicted to take is {least:.3f}"
        )
    wanted = max(aim * ratio, least)
    return _least_price(lambda price: predict(curves, price).ratio <= wanted)


def price_for_relative_mse(curves: Mapping[str, Curve], relative_mse: float) -> float:
    """The price at which the relative MSE is so much; the nearest where none is."""
    return _least_price(lambda price: predict(curves, price).relative_mse >= relative_mse)


def _least_price(enough: Callable[[float], bool]) -> float:
    low, high = np.log(LOWEST), np.log(HIGHEST)
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(float(np.exp(middle))) else (middle, high)
    return float(f"{np.exp(high) * (1 + ROUNDED):.6g}")
