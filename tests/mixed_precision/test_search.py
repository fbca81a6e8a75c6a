"""The search for the cheapest choice within a budget, beside a walk along the whole row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant.mixed_precision.search import CLOSE, MOST_TRIALS, cheapest_within


def falling(values: list[float]) -> list[float]:
    return np.cumsum(values[::-1])[::-1].tolist()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(1e-6, 1), min_size=1, max_size=60),
    st.lists(st.floats(0.05, 20), min_size=60, max_size=60),
    st.floats(1e-4, 3),
)
def test_what_is_found_is_within_and_measured(
    steps: list[float], off: list[float], budget: float
) -> None:
    """Estimates are off by a factor of up to 20 either way, another for each choice."""
    estimates = falling(steps)
    losses = falling([step * factor for step, factor in zip(steps, off, strict=False)])
    place, measured = cheapest_within(estimates, budget, lambda k: losses[k])
    assert len(measured) <= MOST_TRIALS
    assert all(losses[k] == loss for k, loss in measured.items())
    if place < len(losses):
        assert measured[place] <= budget
    first = next((k for k, loss in enumerate(losses) if loss <= budget), len(losses))
    assert place >= first
    if place < len(losses) and len(measured) < MOST_TRIALS:
        assert place == first or losses[place] >= CLOSE * budget


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_where_estimates_are_off_by_one_factor_few_trials_suffice(factor: float) -> None:
    estimates = falling([0.5**k for k in range(40)])
    losses = [factor * estimate for estimate in estimates]
    place, measured = cheapest_within(estimates, 0.01, lambda k: losses[k])
    assert place == next(k for k, loss in enumerate(losses) if loss <= 0.01)
    assert len(measured) <= 4


def test_nothing_within_is_said() -> None:
    place, measured = cheapest_within([3.0, 2.0, 1.0], 0.5, lambda k: 1.0 + k)
    assert place == 3 and min(measured.values()) > 0.5


def test_noise_below_zero_is_no_trouble() -> None:
    place, _ = cheapest_within([0.3, 0.2, 0.1, 0.0], 0.01, lambda k: -0.001)
    assert place == 0
