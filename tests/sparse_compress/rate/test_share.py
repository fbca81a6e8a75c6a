"""How a budget is divided: against all ways to divide it, on curves whose slope is known."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant.errors import MsQuantError
from sparse_compress.rate.share import (
    PRICES,
    Curve,
    Prediction,
    local_prices,
    predict,
    price_for_ratio,
    price_for_relative_mse,
)


@dataclass(frozen=True)
class Ideal:
    """A linear whose error is ``power * 4^-bits``: a bit less costs ``2 ln 2 * error``."""

    weights: int
    sensitivity: float
    power: float

    def error(self, price: float) -> float:
        return price / (2 * math.log(2))

    def ratio(self, price: float) -> float:
        return math.log2(self.power / self.error(price)) / 2 / 8

    def curve(self) -> Curve:
        errors = tuple(map(self.error, PRICES))
        return Curve(self.weights, self.sensitivity, errors, tuple(map(self.ratio, PRICES)))


IDEALS = {
    "small": Ideal(1000, 0.9, 0.4),
    "large": Ideal(8000, 0.3, 1.0),
    "delicate": Ideal(3000, 4.0, 2.5),
}
CURVES = {name: ideal.curve() for name, ideal in IDEALS.items()}
TOTAL = sum(ideal.weights for ideal in IDEALS.values())
WITHIN = (2e-3, 0.01, 0.03)
"""Prices for which no linear is at an end of PRICES."""


def outcome(local: dict[str, float]) -> Prediction:
    """What prices of their own lead to, by the formulas of the curves."""
    stored = sum(IDEALS[name].weights * IDEALS[name].ratio(p) for name, p in local.items())
    relative_mse = sum(
        IDEALS[name].sensitivity * IDEALS[name].error(p) for name, p in local.items()
    )
    return Prediction(stored / TOTAL, relative_mse)


@pytest.mark.parametrize("price", WITHIN)
def test_no_other_division_is_as_small_and_less_damaging(price: float) -> None:
    found = predict(CURVES, price)
    local = local_prices(CURVES, price)
    assert all(PRICES[0] < p < PRICES[-1] for p in local.values())
    grid = np.geomspace(PRICES[0], PRICES[-1], 45)
    tried = 0
    for prices in itertools.product(grid, repeat=len(IDEALS)):
        other = outcome(dict(zip(IDEALS, prices, strict=True)))
        if other.ratio <= found.ratio:
            tried += 1
            assert other.relative_mse >= found.relative_mse * (1 - 1e-9), prices
    assert tried > 1000


@pytest.mark.parametrize("price", WITHIN)
def test_the_same_relative_error_for_all_is_worse(price: float) -> None:
    found = predict(CURVES, price)
    low, high = PRICES[0], PRICES[-1]
    for _ in range(60):  # the one price of relative error that leads to the same size
        middle = math.sqrt(low * high)
        smaller = outcome(dict.fromkeys(IDEALS, middle)).ratio <= found.ratio
        low, high = (low, middle) if smaller else (middle, high)
    same = outcome(dict.fromkeys(IDEALS, high))
    assert same.ratio == pytest.approx(found.ratio, rel=1e-9)
    assert same.relative_mse > 1.2 * found.relative_mse


@pytest.mark.parametrize("price", WITHIN)
def test_a_prediction_is_what_the_curves_say(price: float) -> None:
    expected = outcome(local_prices(CURVES, price))
    assert predict(CURVES, price) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("price", WITHIN)
def test_a_bit_saved_costs_its_price(price: float) -> None:
    """The price is the slope: relative MSE for a bit per weight of the whole model."""
    step = 1e-4
    before, after = predict(CURVES, price * (1 - step)), predict(CURVES, price * (1 + step))
    slope = (after.relative_mse - before.relative_mse) / (8 * (before.ratio - after.ratio))
    assert slope == pytest.approx(price, rel=1e-3)


@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.4, 0.5])
def test_the_price_for_a_ratio_reaches_it(ratio: float) -> None:
    price = price_for_ratio(CURVES, ratio)
    assert predict(CURVES, price).ratio == pytest.approx(ratio, rel=1e-6)
    assert predict(CURVES, price).ratio <= ratio
    assert predict(CURVES, price * (1 - 1e-5)).ratio > ratio  # the least of six digits
    assert price == float(f"{price:.6g}")


def test_a_ratio_that_asks_for_nothing_has_the_least_relative_mse() -> None:
    price = price_for_ratio(CURVES, 0.99)
    assert predict(CURVES, price).relative_mse == predict(CURVES, 0.0).relative_mse
    assert set(local_prices(CURVES, price).values()) == {PRICES[0]}


def test_an_aim_below_the_ratio_is_not_needed_to_reach_it() -> None:
    aimed = predict(CURVES, price_for_ratio(CURVES, 0.4, 0.9)).ratio
    assert aimed == pytest.approx(0.36, rel=1e-6)
    least = outcome(dict.fromkeys(IDEALS, PRICES[-1])).ratio
    price = price_for_ratio(CURVES, 1.05 * least, 0.9)
    assert predict(CURVES, price).ratio == pytest.approx(least, rel=1e-9)
    assert predict(CURVES, price * (1 - 1e-5)).ratio > predict(CURVES, price).ratio
    with pytest.raises(MsQuantError, match=r"^target ratio 0\.05 cannot be reached"):
        price_for_ratio(CURVES, 0.05, 0.9)


def test_an_unreachable_ratio_is_refused_with_the_smallest_one() -> None:
    least = outcome(dict.fromkeys(IDEALS, PRICES[-1])).ratio
    expected = (
        "target ratio 0.05 cannot be reached: the smallest that this model's linears are "
        f"predicted to take is {least:.3f}"
    )
    with pytest.raises(MsQuantError) as error:
        price_for_ratio(CURVES, 0.05)
    assert str(error.value) == expected
    reached = predict(CURVES, price_for_ratio(CURVES, least + 1e-9)).ratio
    assert reached == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("relative_mse", [0.005, 0.02, 0.1])
def test_the_price_for_a_relative_mse_leads_there(relative_mse: float) -> None:
    price = price_for_relative_mse(CURVES, relative_mse)
    assert predict(CURVES, price).relative_mse == pytest.approx(relative_mse, rel=1e-5)


def test_the_price_for_a_relative_mse_that_no_price_leads_to_is_the_nearest() -> None:
    least, most = predict(CURVES, 0.0).relative_mse, predict(CURVES, 1e9).relative_mse
    assert predict(CURVES, price_for_relative_mse(CURVES, least / 10)).relative_mse == least
    assert predict(CURVES, price_for_relative_mse(CURVES, most * 10)).relative_mse == most


def test_one_linear_only() -> None:
    one = {"delicate": CURVES["delicate"]}
    price = price_for_ratio(one, 0.4)
    (local,) = local_prices(one, price).values()
    assert IDEALS["delicate"].ratio(local) == pytest.approx(0.4, rel=1e-6)
    assert local == pytest.approx(price / 4.0)  # its sensitivity
    assert predict(one, price).relative_mse == pytest.approx(4.0 * IDEALS["delicate"].error(local))


def test_a_linear_twice_as_sensitive_pays_half_and_one_twice_as_large_double() -> None:
    before = local_prices(CURVES, 0.01)
    more = {**CURVES, "large": CURVES["large"]._replace(sensitivity=0.6)}
    assert local_prices(more, 0.01)["large"] == pytest.approx(before["large"] / 2)
    assert local_prices(more, 0.01)["small"] == before["small"]
    larger = {**CURVES, "large": CURVES["large"]._replace(weights=16000)}
    grown = 2 * TOTAL / (TOTAL + 8000)
    assert local_prices(larger, 0.01)["large"] == pytest.approx(before["large"] * grown)


def test_the_unit_of_sensitivity_does_not_change_the_division() -> None:
    scaled = {n: c._replace(sensitivity=100 * c.sensitivity) for n, c in CURVES.items()}
    before = local_prices(CURVES, price_for_ratio(CURVES, 0.35))
    after = local_prices(scaled, price_for_ratio(scaled, 0.35))
    assert after == pytest.approx(before, rel=1e-6)


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_higher_price_is_never_larger_nor_less_damaging(data: st.DataObject) -> None:
    """On any curves whose errors grow and whose sizes shrink with the price."""
    curves = {}
    for name in "abc"[: data.draw(st.integers(1, 3))]:
        share = st.floats(1e-6, 1.0)
        points = st.lists(share, min_size=len(PRICES), max_size=len(PRICES))
        errors, ratios = sorted(data.draw(points)), sorted(data.draw(points), reverse=True)
        sensitivity = data.draw(st.floats(1e-6, 100.0))
        weights = data.draw(st.integers(1, 1 << 30))
        curves[name] = Curve(weights, sensitivity, tuple(errors), tuple(ratios))
    found = [predict(curves, 2.0**power) for power in range(-40, 20)]
    assert all(b.ratio <= a.ratio * (1 + 1e-12) for a, b in pairwise(found))
    assert all(b.relative_mse >= a.relative_mse * (1 - 1e-12) for a, b in pairwise(found))


def test_errors_of_zero_are_taken() -> None:
    nothing = Curve(100, 1.0, (0.0,) * len(PRICES), (0.1,) * len(PRICES))
    found = predict({"nothing": nothing}, 0.01)
    assert found.ratio == pytest.approx(0.1) and 0 <= found.relative_mse < 1e-20


def test_a_curve_survives_json() -> None:
    note = json.loads(json.dumps(CURVES["large"]._asdict()))
    assert Curve.from_json(note) == CURVES["large"]
