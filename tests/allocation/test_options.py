"""One price over parts with a few ways each, and the best within a budget, beside all
combinations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant.allocation.knapsack import best_within
from ms_quant.allocation.options import Options, all_prices
from ms_quant.allocation.price import HIGHEST, Point, price_for_cost, price_for_loss, total

NUMBERS = st.integers(0, 12).map(float)
PARTS = st.lists(
    st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=4), min_size=1, max_size=4
)


def made(parts: list[list[tuple[float, float]]]) -> dict[str, Options]:
    return {
        f"p{k}": Options({f"w{j}": Point(*point) for j, point in enumerate(points)})
        for k, points in enumerate(parts)
    }


def combinations(parts: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    return [
        (math.fsum(p[0] for p in way), math.fsum(p[1] for p in way))
        for way in itertools.product(*parts)
    ]


@settings(max_examples=200, deadline=None)
@given(PARTS)
def test_nothing_that_costs_no_more_loses_less(parts: list[list[tuple[float, float]]]) -> None:
    options, every = made(parts), combinations(parts)
    for price in all_prices(options.values()):
        found = total(options.values(), price)
        best = min(loss for cost, loss in every if cost <= found.cost + 1e-9)
        assert found.loss == pytest.approx(best)


@settings(max_examples=200, deadline=None)
@given(PARTS, st.integers(0, 40))
def test_nothing_within_a_budget_loses_less(
    parts: list[list[tuple[float, float]]], budget: int
) -> None:
    options, every = made(parts), combinations(parts)
    chosen = best_within(options, budget)
    points = [options[name].points[way] for name, way in chosen.items()]
    cost, loss = (math.fsum(values) for values in zip(*points, strict=True))
    within = [other for spent, other in every if spent <= budget]
    if within:
        assert cost <= budget and loss == min(within)
    else:
        assert cost == min(spent for spent, _ in every)


@pytest.mark.parametrize("seed", range(3))
def test_of_many_parts_a_budget_is_spent_as_well_as_it_can_be(seed: int) -> None:
    """Where no sums of costs are equal some are dropped: a price says how little that loses."""
    rng = np.random.default_rng(seed)
    parts = {
        str(k): Options(
            {str(bits): Point(bits * size, float(size * 4.0**-bits)) for bits in (2, 4, 8)}
        )
        for k, size in enumerate(rng.uniform(0.1, 3, 500))
    }
    budget = 2.0 + 5 * math.fsum(part.points["2"].cost for part in parts.values()) / 2
    chosen = best_within(parts, budget)
    spent = math.fsum(parts[name].points[way].cost for name, way in chosen.items())
    lost = math.fsum(parts[name].points[way].loss for name, way in chosen.items())
    assert 0.999 * budget <= spent <= budget
    price = next(p for p in all_prices(parts.values()) if total(parts.values(), p).cost > budget)
    bound = total(parts.values(), price).loss - price * (budget - total(parts.values(), price).cost)
    assert bound - 1e-9 <= lost <= 1.001 * bound


def test_from_the_cheapest_to_the_best() -> None:
    part = Options({"a": Point(1, 8), "b": Point(2, 4), "c": Point(3, 3), "d": Point(3, 9)})
    assert part.hull == ["a", "b", "c"] and part.prices() == [4, 1]
    assert [part.choice(price) for price in (math.inf, 4, 2, 1, 0)] == ["a", "b", "b", "c", "c"]


def test_what_is_never_worth_its_price_is_never_chosen() -> None:
    part = Options({"a": Point(0, 10), "dear": Point(4, 9), "b": Point(5, 0)})
    assert part.hull == ["a", "b"]


def test_of_equal_ways_one_counts() -> None:
    assert Options({"a": Point(1, 1), "b": Point(1, 1)}).hull == ["a"]
    assert Options({"a": Point(1, 1), "b": Point(1, 0)}).hull == ["b"]


def test_a_price_never_spends_more_than_the_budget() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        points = np.sort(rng.random((5, 2, 4)))
        parts = [
            Options(
                {str(way): Point(*map(float, pair)) for way, pair in enumerate(ways.T * (1, -1))}
            )
            for ways in points
        ]
        least, most = (total(parts, price).cost for price in (HIGHEST, 0))
        budget = rng.uniform(least, most)
        assert total(parts, price_for_cost(parts, budget)).cost <= budget


def test_prices_of_a_budget_and_of_a_loss() -> None:
    rng = np.random.default_rng(0)
    parts = [
        Options({str(bits): Point(bits, float(rng.random() * 4.0**-bits)) for bits in (2, 4, 8)})
        for _ in range(20)
    ]
    for cost in (40, 80, 120, 160):
        price = price_for_cost(parts, cost)
        assert total(parts, price).cost <= cost
        assert total(parts, price * (1 - 1e-5)).cost >= total(parts, price).cost
    worst, best = (total(parts, price).loss for price in (HIGHEST, 0))
    price = price_for_loss(parts, (worst + best) / 2)
    assert total(parts, price).loss >= (worst + best) / 2 > total(parts, price * 0.99).loss - 1e-3
