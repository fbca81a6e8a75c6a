"""Recall windows against every stretch of all sorted values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant.statistics.recall_window import head_maxima


def slow(values: list[float], outside: int) -> float:
    """How far the shortest stretch of a head's values in one window reaches."""
    values = sorted(values)
    left_out = len(values) // outside if outside else 0
    size = len(values) - left_out
    best, found = float("inf"), 0.0
    for start in range(left_out + 1):
        low, high = values[start], values[start + size - 1]
        if high - low < best:
            best, found = high - low, max(abs(low), abs(high))
    return found


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 3, 12, 6))),
    outside=st.sampled_from([0, 3, 5, 10, 1000]),
    whole=st.booleans(),
    seed=st.integers(0, 999),
)
def test_they_are_the_shortest_stretches(shape, outside, whole, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_t(2, shape).astype(np.float32)
    if whole:  # many are equal, and so are stretches
        x = np.round(x)
    found = head_maxima(x, outside)
    assert found.dtype == np.float32 and found.shape == (2, shape[1])
    for head in range(shape[1]):
        windows = [window[head].reshape(-1).tolist() for window in x]
        assert found[0, head] == max(abs(value) for values in windows for value in values)
        assert found[1, head] == max(slow(values, outside) for values in windows)


@pytest.mark.parametrize(
    ("values", "reach"),
    [
        ([*range(-50, 50), 1000], 50),  # the outlier is left out
        ([-1000, *range(-50, 50)], 50),
        ([1000, *range(100, 200)], 199),  # a range that does not hold 0
        ([*range(-50, 49)], 50),  # 99 values: none may be left out
    ],
)
def test_one_in_a_hundred_is_left_out(values, reach):
    x = np.array(values, np.float32).reshape(1, 1, -1, 1)
    assert head_maxima(x, 100)[1, 0] == reach


def test_the_vendor_leaves_out_one_in_ten_thousand():
    x = np.zeros((1, 1, 100, 200), np.float32)
    x[0, 0, 3, 5], x[0, 0, 70, 8], x[0, 0, 71, 9] = 9, 8, 7
    np.testing.assert_array_equal(head_maxima(x, 10_000), [[9], [7]])
    np.testing.assert_array_equal(head_maxima(x[:, :, :99], 10_000), [[9], [8]])
