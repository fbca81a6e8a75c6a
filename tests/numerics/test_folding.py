"""Smoothing vectors in what is stored, and read back from it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ms_quant.numerics.folding import (
    divided_gain,
    divided_rows,
    exact_columns,
    few_bits,
    gain_divisors,
    powers_of_two,
    row_divisors,
)
from ms_quant.numerics.storage import DTYPES

BF16, F16 = DTYPES["bfloat16"], DTYPES["float16"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1.0, 1.0),
        (63 / 64, 63 / 64),
        (127 / 128, 1.0),  # a tie, to even: between 63 / 64 and 1
        (1.015625, 1.0),  # a tie, to even
        (1.03125, 1.03125),
        (3e-5, 63 / 64 * 2**-15),
        (1e30, 50 / 64 * 2**100),
    ],
)
def test_six_significant_bits(value: float, rounded: float) -> None:
    assert few_bits(np.array([value]))[0] == np.float32(rounded)


@pytest.mark.parametrize(
    ("value", "rounded"), [(1, 1), (1.41, 1), (1.42, 2), (0.36, 0.5), (0.35, 0.25), (3e-5, 2**-15)]
)
def test_the_nearest_power_of_two(value: float, rounded: float) -> None:
    assert powers_of_two(np.array([value]))[0] == rounded


@pytest.mark.parametrize("columns", [1, 3, 512])
@pytest.mark.parametrize("source", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rows_say_what_they_were_divided_by(columns: int, source: type, dtype: np.dtype) -> None:
    """However few values a row has, and however they were rounded."""
    weight = rng().normal(size=(4000, columns)).astype(source).astype(np.float32)
    rows = np.exp(rng(1).normal(size=4000)).astype(np.float32)
    stored, found = divided_rows(weight, rows, dtype)
    np.testing.assert_array_equal(stored, stored.astype(dtype).astype(np.float32))
    np.testing.assert_array_equal(found, row_divisors(weight, stored))
    if dtype == BF16:
        np.testing.assert_array_equal(found, few_bits(rows))
    exact = (weight.astype(np.float64) / found[:, None]).astype(np.float32).astype(dtype)
    np.testing.assert_array_equal(stored, exact.astype(np.float32))


def test_rows_that_say_nothing_stay() -> None:
    weight = np.float32([[0, 0], [3e38, 1], [1, 2]])
    stored, found = divided_rows(weight, np.float32([4, 0.25, 0.5]), BF16)
    np.testing.assert_array_equal(found, [1, 1, 0.5])
    np.testing.assert_array_equal(stored, weight.astype(BF16).astype(np.float32) * [[1], [1], [2]])


def test_gains_divided_by_powers_of_two_are_not_rounded() -> None:
    gain = np.exp(rng().normal(size=64)).astype(np.float32)  # more bits than are stored
    smooth = powers_of_two(np.exp(rng(1).normal(size=64)))
    stored, found = divided_gain(gain, smooth, BF16, exact=True)
    np.testing.assert_array_equal(found, smooth)
    np.testing.assert_array_equal(stored * smooth, gain.astype(BF16).astype(np.float32))
    np.testing.assert_array_equal(gain_divisors(gain, stored, exact=True), smooth)


def test_gains_that_powers_of_two_would_round_stay() -> None:
    gain = np.float32([1.5 * 2**-14, 0, 1, 3])
    stored, found = divided_gain(gain, np.float32([1024, 2, 2, 2]), F16, exact=True)
    np.testing.assert_array_equal(stored, [1.5 * 2**-14, 0, 0.5, 1.5])
    np.testing.assert_array_equal(found, [1, 1, 2, 2])


def test_columns_that_would_be_rounded_are_told() -> None:
    weight = np.float32([[2**-14 * 1.5, 40000, 1], [1, 1, 1]])
    np.testing.assert_array_equal(
        exact_columns(weight, np.float32([2**-12, 2, 2]), F16), [False, False, True]
    )
