"""How inputs are spread: massive channels and tokens, and msModelSlim's measures."""

from __future__ import annotations

import numpy as np
import pytest

from ms_quant.analysis.inputs import InputWatch, describe_input
from ms_quant.analysis.records import InputFacts
from ms_quant.statistics.observers import ActivationStats

WINDOWS, LENGTH, CHANNELS = 6, 16, 40


def seen(rows: np.ndarray, batch: int = 2, routed: bool = False) -> InputFacts:
    """The facts of (windows, tokens, channels), some windows at a time."""
    watch = InputWatch(len(rows), rows.shape[1], routed)
    stats = ActivationStats(rows.shape[2], rows.shape[0] * rows.shape[1])
    for start in range(0, len(rows), batch):
        flat = rows[start : start + batch].reshape(-1, rows.shape[2])
        watch.look(flat)
        stats.update(flat)
    return watch.facts(stats)


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((WINDOWS, LENGTH, CHANNELS), np.float32)


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_measures_are_those_of_the_definition(rows: np.ndarray, batch: int) -> None:
    rows[..., 3] *= 7
    found, x = seen(rows, batch), rows.astype(np.float64).reshape(-1)
    low, high = np.quantile(x, (0.25, 0.75))
    absmax, central = np.abs(x).max(), x - x.mean()
    assert found.absmax == absmax and found.tokens == WINDOWS * LENGTH
    assert found.std == pytest.approx(absmax / x.std(), rel=1e-9)
    assert found.quantile == pytest.approx(2 * absmax / 254 / (high - low), rel=1e-6)
    expected = (central**4).mean() / x.var() ** 2 - 3
    assert found.kurtosis == pytest.approx(expected, rel=1e-9)
    assert found.token_median == np.median(np.abs(rows).max(axis=2))
    assert found.channel_median == np.median(np.abs(rows).max(axis=(0, 1)))


def test_nothing_is_massive_in_noise(rows: np.ndarray) -> None:
    found = seen(rows)
    assert not found.massive and found.channels == found.positions == ()


def test_massive_first_tokens_are_named(rows: np.ndarray) -> None:
    rows[:, 0, 29] = -3275
    rows[:, 0, 7] = 2000
    rows[1:, 0, 8] = 900  # less than half of the largest
    found = seen(rows)
    assert found.channels == (29, 7) and found.positions == (0,)
    assert found.massive_tokens == WINDOWS
    median = f"{np.median(np.abs(rows).max(axis=2)):,.2g}"
    assert describe_input(found) == f"3,275 at channels 29, 7, first token; median {median}"


def test_massive_tokens_in_other_places_are_counted(rows: np.ndarray) -> None:
    rows[0, 0, 5] = rows[2, 3, 5] = 500
    found = seen(rows)
    assert "at channel 5, 2 of 96 tokens (positions 0, 3)" in describe_input(found)
    assert found.massive_tokens == 2


def test_a_channel_that_is_large_for_all_tokens_is_a_channel_and_no_token(
    rows: np.ndarray,
) -> None:
    rows[..., 11] = 100 + rows[..., 11]
    found = seen(rows)
    assert found.channels == (11,) and found.massive_tokens == 0
    assert describe_input(found).split(" at ")[1].startswith("channel 11; median ")


def test_a_routed_input_has_no_positions(rows: np.ndarray) -> None:
    rows[0, 0, 5] = 500
    watch = InputWatch(WINDOWS, LENGTH, routed=True)
    stats = ActivationStats(CHANNELS, None)
    some = rows.reshape(-1, CHANNELS)[:37]
    watch.look(some)
    stats.update(some)
    found = watch.facts(stats)
    assert found.positions == () and found.massive_tokens == 1
    assert "1 of 37 tokens" in describe_input(found)


def test_an_input_of_zeros_is_not_massive() -> None:
    found = seen(np.zeros((2, 4, 3), np.float32))
    assert not found.massive and found.std == found.quantile == found.kurtosis == 0
