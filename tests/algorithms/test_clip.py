"""The clip search against a search over Python floats."""

from __future__ import annotations

import numpy as np
import pytest

from ms_quant.algorithms.clip import RATIOS, search_clip


def slow_losses(row: np.ndarray, inputs: np.ndarray) -> list[float]:
    """The row's output error for each ratio, everything in float64."""
    losses = []
    for ratio in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55):
        scale = max(abs(float(v)) for v in row) * ratio / 127 or 1.0
        back = [min(127, max(-128, round(float(v) / scale))) * scale for v in row]
        error = [b - float(v) for b, v in zip(back, row, strict=True)]
        outputs = [sum(float(x) * e for x, e in zip(t, error, strict=True)) for t in inputs]
        losses.append(sum(o * o for o in outputs) / len(outputs))
    return losses


def test_grid():
    assert RATIOS == (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)


@pytest.mark.parametrize("inner", [1, 3, 40])
@pytest.mark.parametrize("tokens", [1, 9])
def test_each_row_has_the_ratio_of_the_slow_search(inner, tokens):
    """Its choice is the smallest slow loss up to the float32 sums of the fast one."""
    rng = np.random.default_rng(inner + tokens)
    weight = rng.standard_normal((12, inner)).astype("f4")
    weight[::2, 0] *= 6  # outliers that are worth clipping
    inputs = rng.standard_normal((tokens, inner)).astype("f4")
    inputs[:, 0] *= 0.02
    ratios = search_clip(weight, inputs)
    assert ratios.shape == (12, 1)
    assert ratios.dtype == np.float32
    for row, ratio in zip(weight, ratios[:, 0], strict=True):
        losses = slow_losses(row, inputs)
        chosen = losses[[float(np.float32(r)) for r in RATIOS].index(float(ratio))]
        # A relative 2**-24 of each product and sum, squared, against the largest output error.
        magnitude = np.abs(inputs).max() * np.abs(row).sum()
        slack = (inner + 4) * 2.0**-24 * magnitude
        assert np.sqrt(chosen) <= np.sqrt(min(losses)) + 2 * slack
    if inner == 40:
        assert (ratios[::2] < 1).any(), "the outliers no longer make clipping worth it"


def test_rows_do_not_influence_each_other():
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((7, 30)).astype("f4")
    inputs = rng.integers(-8, 9, (16, 30)).astype("f4")
    together = search_clip(weight, inputs)
    for n in range(7):
        np.testing.assert_array_equal(search_clip(weight[n : n + 1], inputs), together[n : n + 1])


@pytest.mark.parametrize(
    ("weight", "inputs"),
    [
        ([[0, 0, 0]], [[1, 2, 3]]),  # an all-zero row has no error at any ratio
        ([[1, 2, 3]], [[0, 0, 0]]),  # nothing comes in
        ([[127, -127, 5]], [[1, 1, 1]]),  # exact without clipping
    ],
)
def test_ties_go_to_the_larger_ratio(weight, inputs):
    assert search_clip(np.float32(weight), np.float32(inputs)).tolist() == [[1.0]]


def test_an_outlier_that_no_input_excites_is_clipped():
    """Column 0 sees zeros, so its error is free; 0.55 gives the others the finest steps."""
    weight = np.float32([[1.0, 0.31, -0.24, 0.17]])
    inputs = np.float32([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    losses = slow_losses(weight[0], inputs)
    best = RATIOS[losses.index(min(losses))]
    assert best < 1
    assert search_clip(weight, inputs)[0, 0] == np.float32(best)
