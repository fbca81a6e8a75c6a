"""The histogram against binning in exact fractions, its ranges against slow definitions."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from ms_quant.errors import MsQuantError
from ms_quant.numerics import affine
from ms_quant.statistics import histogram
from ms_quant.statistics.histogram import Histogram

HUGE = float(np.finfo(np.float32).max)
ANY = st.floats(-HUGE, HUGE, width=32)
NEAR = st.integers(-(2**12), 2**12).map(lambda i: i / 64)
VALUES = st.lists(ANY, min_size=1, max_size=25) | st.lists(NEAR, min_size=1, max_size=40)
SEEDS = st.integers(0, 2**20)
BITS = st.sampled_from([4, 8])


def histogram_of(values, bins: int = 2048) -> Histogram:
    result = Histogram(bins)
    result.update(np.array(values, np.float32))
    return result


def state(h: Histogram) -> tuple:
    return h.low, h.high, h.exponent, h.first, h.counts.dtype, h.counts.tolist()


def place(value: float, exponent: int) -> int:
    return math.floor(Fraction(value) / Fraction(2) ** exponent)


def exact_state(values: list[float], bins: int) -> tuple:
    """The definition: the smallest exponent at which the bins suffice and |i| <= 2^24."""
    low, high = min(values), max(values)
    largest = Fraction(max(-low, high))
    exponent = -149
    while (
        largest >= Fraction(2) ** (exponent + 24)
        or place(high, exponent) - place(low, exponent) >= bins
    ):
        exponent += 1
    first, last = place(low, exponent), place(high, exponent)
    counts = [0] * (last - first + 1)
    for value in values:
        counts[place(value, exponent) - first] += 1
    return low, high, exponent, first, np.dtype(np.int64), counts


@given(values=VALUES, bins=st.integers(2, 9) | st.just(2048), seed=SEEDS, data=st.data())
@settings(deadline=None)
def test_any_order_batches_and_merges_give_the_exact_counts(values, bins, seed, data):
    x = np.random.default_rng(seed).permutation(np.array(values, np.float32))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=5)))
    parts = [Histogram(bins) for _ in range(3)]
    for batch in np.split(x, cuts):  # some are empty
        parts[data.draw(st.integers(0, 2))].update(batch)
    order = data.draw(st.permutations(parts))
    order[1].merge(order[2])
    order[0].merge(order[1])
    assert state(order[0]) == exact_state(values, bins)
    assert order[0].total == len(values)


def test_long_and_shaped_updates():
    x = np.random.default_rng(0).standard_t(2, (3, 50_000)).astype("f4")
    whole, rows = Histogram(), Histogram()
    whole.update(x.T)
    for row in x:
        rows.update(row[:, None])
    assert state(whole) == state(rows)
    edges = whole.edges
    assert whole.counts.tolist() == np.histogram(x.astype(np.float64), edges)[0].tolist()
    assert 1023 <= whole.counts.size <= 2048
    assert (np.diff(edges) == whole.width).all()
    assert edges[0] <= whole.low == x.min()
    assert whole.high == x.max() < edges[-1]


def test_a_negative_subnormal_is_not_in_the_bin_of_0():
    tiny = np.float32(-1e-45)
    assert histogram_of([tiny, 3e38], bins=2).counts.tolist() == [1, 1]
    assert histogram_of([tiny, tiny, 0, 1], bins=100).counts[:2].tolist() == [2, 1]


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, HUGE, -HUGE, 2.0**-149])
def test_all_equal(value):
    h = histogram_of([value] * 7)
    assert h.counts.tolist() == [7]
    assert h.edges[0] == value
    assert h.percentile_range(0.5) == h.percentile_range(1) == (value, value)
    assert h.least_error_range() == (min(value, 0), max(value, 0))
    # The bin ends within 2^-23 of the value, or 2^-149; rounding the scale moves it by 2^-24.
    assert h.quantization_error(value, value) <= 7**0.5 * max(abs(value) * 2**-22, 2**-148)


def test_zeros_have_one_sign():
    for values in ([0.0, -0.0], [-0.0, 0.0], [-0.0]):
        h = histogram_of(values)
        ranges = (h.low, h.high, *h.percentile_range(1), *h.least_error_range())
        assert [math.copysign(1, v) for v in ranges] == [1] * 6


def test_empty_updates_and_merges_change_nothing():
    h = histogram_of([1, 2])
    before = state(h)
    h.update(np.zeros((0, 4), np.float32))
    h.merge(Histogram())
    assert state(h) == before
    empty = Histogram()
    empty.merge(h)
    assert state(empty) == before


def test_a_histogram_merged_with_itself_has_every_count_twice():
    h = histogram_of([1, 2, 2])
    h.merge(h)
    assert state(h) == state(histogram_of([1, 2, 2] * 2))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int8])
def test_narrower_types(dtype):
    x = np.array([-3, 0, 1, 1, 7]).astype(dtype)
    h = Histogram()
    h.update(x)
    assert state(h) == state(histogram_of(x.astype(np.float32)))


def test_refusals():
    h = Histogram(8, "q_proj.input")
    h.update(np.ones(2, np.float32))
    before = state(h)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(MsQuantError, match=r"^q_proj.input: 1 of 3 values are NaN or inf"):
            h.update(np.array([0, bad, 9], np.float32))
    with pytest.raises(MsQuantError, match=r"^q_proj.input: float64 values, expected float32"):
        h.update(np.ones(2))
    with pytest.raises(
        MsQuantError, match=r"^q_proj.input: a histogram of 9 bins, expected one of 8 bins$"
    ):
        h.merge(Histogram(9))
    assert state(h) == before
    for share in (0, -0.5, 1.1, math.nan):
        with pytest.raises(MsQuantError, match=r"^share: .*, expected a number above 0 and at"):
            h.percentile_range(share)
    with pytest.raises(MsQuantError, match=r"^bits: 5, expected 8 or 4$"):
        h.least_error_range(5)
    with pytest.raises(MsQuantError, match=r"^bits: 16, expected 8 or 4$"):
        h.quantization_error(0, 1, 16)
    for low, high in ((1, 0), (0, math.inf), (math.nan, 0)):
        with pytest.raises(MsQuantError, match=r"^range: .*, expected finite ends in ascending"):
            h.quantization_error(low, high)
    for bins in (1, True, 8.0):
        with pytest.raises(MsQuantError, match=r"^bins: .*, expected an integer of at least 2$"):
            Histogram(bins)


def test_nothing_counted():
    h = Histogram(name="x")
    for ask in (
        h.least_error_range,
        lambda: h.percentile_range(1),
        lambda: h.quantization_error(0, 1),
    ):
        with pytest.raises(
            MsQuantError, match=r"^x: no values were counted, expected at least one$"
        ):
            ask()


# Percentiles


@given(
    values=VALUES,
    bins=st.integers(2, 20),
    share=st.floats(1e-6, 1) | st.integers(1, 100).map(lambda i: i / 100),
)
@settings(deadline=None)
def test_percentile_range_against_sorted_values(values, bins, share):
    h = histogram_of(values, bins)
    low, high = h.percentile_range(share)
    assert low.dtype == high.dtype == np.float32
    assert sum(low <= v <= high for v in values) >= Fraction(str(share)) * len(values)
    cut = (1 - Fraction(str(share))) / 2 * len(values)
    ordered = sorted(map(Fraction, values))
    lowest, highest = ordered[math.floor(cut)], ordered[-1 - math.floor(cut)]
    low, high, width = Fraction(float(low)), Fraction(float(high)), Fraction(h.width)
    assert max(lowest - width, ordered[0]) <= low <= lowest
    assert highest <= high <= min(highest + width, ordered[-1])
    assert low == ordered[0] or low % width == 0
    assert high == ordered[-1] or high % width == 0


def test_percentiles_by_hand():
    h = histogram_of(range(20), bins=32)
    assert h.width == 1
    assert h.percentile_range(1) == (0, 19)
    assert h.percentile_range(0.9) == (1, 19)  # 18 of 20: the float 0.9 is above 9/10
    assert h.percentile_range(0.89) == (1, 19)
    assert h.percentile_range(0.8) == (2, 18)
    assert h.percentile_range(1e-9) == (9, 11)


# The quantization error


def exact_grid(low: float, high: float, bits: int) -> tuple[Fraction, list[Fraction]]:
    scale, zero_point = affine.asymmetric_parameters(low, high, bits)
    step = Fraction(float(scale))
    first = -(2 ** (bits - 1))
    return step, [(first + k - int(zero_point)) * step for k in range(2**bits)]


def exact_integral(start: Fraction, end: Fraction, levels: list[Fraction]) -> Fraction:
    """Squared distance to the nearest level, piece by piece between the levels' midpoints."""
    middles = [(a + b) / 2 for a, b in pairwise(levels)]
    total = Fraction(0)
    for k, level in enumerate(levels):
        a = start if k == 0 else max(start, middles[k - 1])
        b = end if k == len(levels) - 1 else min(end, middles[k])
        if a < b:
            total += ((b - level) ** 3 - (a - level) ** 3) / 3
    return total


def exact_squared_error(h: Histogram, low: float, high: float, bits: int) -> Fraction:
    _, levels = exact_grid(low, high, bits)
    width = Fraction(h.width)
    total = Fraction(0)
    for i, count in enumerate(h.counts.tolist()):
        if count:
            start = (h.first + i) * width
            total += count * exact_integral(start, start + width, levels) / width
    return total


def rms(square: Fraction, count: int, unit: Fraction) -> float:
    """The root of the mean square, in a unit that keeps it within the range of floats."""
    return math.sqrt(square / count / unit**2)


@given(values=VALUES, ends=st.tuples(ANY, ANY) | st.tuples(NEAR, NEAR), bits=BITS, data=st.data())
@settings(deadline=None, max_examples=60)
def test_error_against_exact_integrals(values, ends, bits, data):
    h = histogram_of(values, data.draw(st.integers(2, 12)))
    if data.draw(st.booleans()):
        ends = h.low, h.high
    low, high = sorted(ends)
    step, _ = exact_grid(low, high, bits)
    exact = rms(exact_squared_error(h, low, high, bits), h.total, step)
    found = float(Fraction(h.quantization_error(low, high, bits)) / step) / h.total**0.5
    # Places in steps are off by 2^-53 of themselves. Bins are at least 2^-24 of the largest one
    # wide, so the difference of two edges, or of their cubes, is off by a few 2^-28 of itself.
    assert found == pytest.approx(exact, rel=2.0**-26, abs=2.0**-40)


def samples() -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    yield "normal", rng.standard_normal(20_000)
    yield "heavy tails", rng.standard_t(3, 20_000)
    yield "after a ReLU", np.maximum(rng.standard_normal(20_000), 0)
    yield "negative", -1 - rng.random(5_000)
    yield "far from 0", 1e4 + rng.random(5_000)
    yield "two values", np.repeat([-1.0, 3.0], 500)
    yield "tiny", rng.standard_normal(5_000) * 1e-37
    yield "huge", rng.uniform(-3e38, 3e38, 5_000)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("x", [pytest.param(x, id=name) for name, x in samples()])
def test_error_against_quantized_values(x, bits):
    x = x.astype(np.float32)
    for bins in (64, 2048):
        h = histogram_of(x, bins)
        for low, high in ((h.low, h.high), h.least_error_range(bits), h.percentile_range(0.99)):
            scale, zero_point = affine.asymmetric_parameters(low, high, bits)
            codes = affine.quantize(x, scale, zero_point, bits)
            errors = affine.dequantize(codes, scale, zero_point).astype(np.float64) - x
            truth = np.linalg.norm(errors) / np.sqrt(x.size)
            estimate = h.quantization_error(low, high, bits) / np.sqrt(x.size)
            # Values are moved by at most a bin; the float32 roundings are 2^-14 steps together.
            assert abs(truth - estimate) <= h.width / 3**0.5 + scale * 2.0**-14


# The search


class TieError(Exception):
    """Two errors are so close that rounding decides."""


def slow_search(h: Histogram, bits: int, quantile_steps: int) -> tuple[float, float]:
    """Step by step, as the docstring says."""
    counts, n = h.counts.tolist(), h.total

    def ends(below: int, above: int) -> tuple[int, int]:
        start, stop = 0, len(counts)
        while sum(counts[: start + 1]) * quantile_steps <= below * n:
            start += 1
        while sum(counts[stop - 1 :]) * quantile_steps <= above * n:
            stop -= 1
        return min(h.first + start, 0), max(h.first + stop, 0)

    def as_range(low: int, high: int) -> tuple[float, float]:
        return max(low * h.width, min(h.low, 0)), min(high * h.width, max(h.high, 0))

    below = above = 0
    best = as_range(*ends(0, 0))
    least = exact_squared_error(h, *best, bits)
    while below + above + 1 < quantile_steps:
        low, high = ends(below, above)
        low_gain, high_gain = ends(below + 1, above)[0] - low, high - ends(below, above + 1)[1]
        if not low_gain and not high_gain:
            below, above = below + 1, above + 1
            continue
        if low_gain > high_gain:
            below += 1
        else:
            above += 1
        candidate = as_range(*ends(below, above))
        error = exact_squared_error(h, *candidate, bits)
        if abs(error - least) <= least / 10**9:
            raise TieError
        if error > least:
            break
        best, least = candidate, error
    return best


def test_moves_by_hand():
    """Both tails are as sparse: the upper one first; then steps in which nothing moves."""
    h = histogram_of([-3.5, *[-0.5] * 3, *[0.5] * 3, 3.5], bins=8)
    assert h.width == 1
    moves = h._moves(steps=8)  # a step is one of the values
    assert list(moves) == [(-3.5, 1), (-1, 1), (-1, 0)]


@given(
    start=st.integers(-20, 8),
    counts=st.lists(st.integers(0, 3) | st.integers(0, 400), min_size=1, max_size=20),
    steps=st.integers(2, 300),
    bits=BITS,
)
@settings(deadline=None, max_examples=150)
def test_search_against_single_steps(start, counts, steps, bits):
    assume(sum(counts))
    h = histogram_of(np.repeat(np.arange(len(counts)) + start + 0.25, counts), bins=len(counts) + 1)
    try:
        expected = slow_search(h, bits, steps)
    except TieError:
        reject()
    assert h.least_error_range(bits, steps) == expected


def test_search_against_single_steps_of_1e_5():
    x = np.random.default_rng(1).standard_t(4, 100_000)
    h = histogram_of(x, bins=128)
    found = h.least_error_range(4)
    assert found == slow_search(h, 4, histogram.QUANTILE_STEPS)
    assert h.low < found[0] and found[1] < h.high  # both ends moved


@given(values=VALUES, bins=st.integers(2, 40), bits=BITS)
@settings(deadline=None)
def test_found_ranges_are_within_the_whole_one_and_no_worse(values, bins, bits):
    h = histogram_of(values, bins)
    low, high = h.least_error_range(bits)
    assert low.dtype == high.dtype == np.float32
    assert min(h.low, 0) <= low <= 0 <= high <= max(h.high, 0)
    assert low == min(h.low, 0) or Fraction(float(low)) % Fraction(h.width) == 0
    assert high == max(h.high, 0) or Fraction(float(high)) % Fraction(h.width) == 0
    whole = h.quantization_error(h.low, h.high, bits)
    assert h.quantization_error(low, high, bits) <= whole * (1 + 1e-12)


def test_outliers_are_clipped_and_the_error_falls():
    x = np.random.default_rng(2).standard_normal(1_000_000).astype(np.float32)
    x[:20] = np.linspace(30, 40, 20)
    h = histogram_of(x)
    low, high = h.least_error_range(4)
    assert -6 < low < -2.5 and 2.5 < high < 6
    assert h.quantization_error(low, high, 4) < h.quantization_error(h.low, h.high, 4) / 3


def test_one_sided_values_are_clipped_at_their_side_only():
    x = np.abs(np.random.default_rng(4).standard_normal(500_000)) + 0.5
    low, high = histogram_of(x).least_error_range()
    assert low == 0 and 3 < high < x.max() - 0.1
    assert histogram_of(-x).least_error_range()[1] == 0


def test_the_search_is_fast():
    """The longest of the searches that real distributions lead to: hundreds of moves."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-0.1, 0.1, 1_000_000), rng.uniform(-1, 1, 20_000)])
    h = histogram_of(x)
    assert h.counts.size > 2040
    assert len(list(h._moves())) <= 2048
    seconds = []
    for _ in range(3):
        start = time.thread_time()
        low, _ = h.least_error_range(4)
        seconds.append(time.thread_time() - start)
    assert low > -0.8
    assert min(seconds) < 0.05
