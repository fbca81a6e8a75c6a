"""Prices and choices against all 255 values, one by one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_compress.codec import encoded_size
from sparse_compress.rate.dictionary import (
    BITS,
    LITERAL_BITS,
    Dictionary,
    mean_first_bits,
    pair_saving,
)


def test_the_prices_are_those_of_the_format() -> None:
    assert BITS.tolist() == [3] * 4 + [6] * 18 + [9] * 14
    assert LITERAL_BITS == 12


def slow_choice(dictionary: Dictionary, target: float, price: float, first_bits: float) -> float:
    """The least cost over every value."""
    prices = {**dict.fromkeys(range(-127, 128), 12), **dictionary.prices()}
    prices[dictionary.first] = first_bits
    return min((target - value) ** 2 + price * bits for value, bits in prices.items())


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 36),
    seed=st.integers(0, 2**32 - 1),
    price=st.sampled_from([0.0, 0.01, 0.3, 2.0, 50.0]),
    first_bits=st.sampled_from([0.0, 1.5, 3.0]),
)
def test_no_value_is_better(size: int, seed: int, price: float, first_bits: float) -> None:
    rng = np.random.default_rng(seed)
    dictionary = Dictionary(rng.permutation(np.arange(-127, 128))[:size], 0.2)
    target = rng.normal(0, 60, 40).astype(np.float32)
    target[:3] = -400, 400, 0.5
    value, cost = dictionary.choose(target, price, first_bits)
    np.testing.assert_array_equal(value, np.rint(value))
    assert np.abs(value).max() <= 127
    for t, v, c in zip(target.tolist(), value.tolist(), cost.tolist(), strict=True):
        assert c == pytest.approx(slow_choice(dictionary, t, price, first_bits), rel=1e-5, abs=1e-5)
        bits = {**dictionary.prices(), dictionary.first: first_bits}.get(int(v), LITERAL_BITS)
        assert c == pytest.approx((t - v) ** 2 + price * bits, rel=1e-5, abs=1e-5)


def test_ties_go_to_d0_and_then_to_the_cheaper_code() -> None:
    dictionary = Dictionary(np.array([4, 0, 1, 2, 3]), 0.5)
    target = np.array([2.0, 3.0], np.float32)
    value, _ = dictionary.choose(target, np.float32(0), 0.0)
    assert value.tolist() == [2, 3]
    value, _ = dictionary.choose(np.array([3.5], np.float32), np.float32(0), 0.0)
    assert value.tolist() == [4]


def test_the_dictionary_is_the_codecs() -> None:
    codes = np.array([[5, 5, 5, -1, -1, 0]], np.int8)
    found = Dictionary.of(codes)
    assert found.values.tolist() == [5, -1, 0] and found.first_share == 0.5
    assert Dictionary.of(codes[:, :5]).values.tolist() == [5, -1]  # an odd count


def test_bits_are_what_the_codec_stores_less_words_and_headers(
    code_bits: Callable[[np.ndarray, Dictionary], int],
) -> None:
    codes = np.rint(np.random.default_rng(0).normal(0, 1.2, (512, 512))).astype(np.int8)
    bits = code_bits(codes, Dictionary.of(codes))
    assert 1.02 < 8 * encoded_size(codes) / bits < 1.07


def test_what_a_d0_costs_in_the_mean() -> None:
    share = 0.4
    row = np.where(np.random.default_rng(1).random(200_000) < share, 0, 1).astype(np.int8)
    runs = np.diff(np.flatnonzero(np.diff(np.pad(row == 0, 1).astype(np.int8)))[::1])[::2]
    bits = 3 * np.ceil(runs / 2).sum() / len(row)
    assert bits == pytest.approx(3 * share / (1 + share), rel=0.01)
    step = 1e-6
    slope = (3 * (share + step) / (1 + share + step) - 3 * share / (1 + share)) / step
    assert mean_first_bits(share) == pytest.approx(slope, rel=1e-4)
    assert pair_saving(share) == pytest.approx(share * (3 - pair_saving(share)))
