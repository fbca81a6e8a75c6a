"""The price of a histogram: never above the truth, and near it where order is random."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_compress import encoded_size, price
from sparse_compress.codec import CodecError, pricing
from sparse_compress.codec.format import HIGH, LOW


def counts_of(data):
    return np.bincount(data, minlength=256)


@st.composite
def streams(draw):
    """Whole tiles of runs and noise, sorted or not, so that every order is tried."""
    total = 512 * draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    few = rng.permutation(256)[: draw(st.sampled_from([1, 2, 5, 36, 60, 256]))]
    frequent = draw(st.sampled_from([0, 0.2, 0.5, 0.8, 0.97]))
    longest = draw(st.sampled_from([1, 3, 9, 100]))
    values = np.where(rng.random(total) < frequent, few[0], rng.choice(few, total))
    data = np.repeat(values, rng.integers(1, longest + 1, total))[:total].astype(np.uint8)
    return np.sort(data) if draw(st.booleans()) else data


@settings(max_examples=300, deadline=None)
@given(
    data=streams(),
    mode=st.sampled_from(["low", "high"]),
    tile=st.sampled_from([512, 1024, 4096, 32768]),
)
def test_the_bound_is_never_above_the_truth(data, mode, tile):
    found = price(counts_of(data), mode, tile_bytes=tile)
    assert found.lower_bound <= 8 * encoded_size(data, mode, tile_bytes=tile)
    assert found.lower_bound <= found.estimate <= max(found.lower_bound, 8 * data.size)


@pytest.mark.parametrize(("mode", "size"), [("low", 6528), ("high", 4352)])
def test_the_bound_of_zeros_is_near_the_floor(mode, size):
    found = price(counts_of(np.zeros(32768, np.uint8)), mode)
    assert 0.97 * size <= found.lower_bound / 8 <= size


def test_bypassed_data_costs_its_bytes():
    assert price(counts_of(np.arange(32768) & 255)).estimate == 8 * 32768


def gaussian(size, sigma, zeros):
    rng = np.random.default_rng(size)
    data = np.clip(np.rint(rng.normal(0, sigma, size)), -128, 127).astype(np.int8)
    data[rng.random(size) < zeros] = 0
    return data.view(np.uint8)


@pytest.mark.parametrize("mode", ["low", "high"])
@pytest.mark.parametrize("sigma", [1, 3, 12, 40])
@pytest.mark.parametrize("zeros", [0, 0.5, 0.7, 0.9, 0.97])
def test_the_estimate_of_gaussian_data(mode, sigma, zeros):
    """The tolerances that the docstring states."""
    for size, tolerance in ((1 << 18, 0.015), (1 << 15, 0.04)):
        data = gaussian(size, sigma, zeros)
        exact = 8 * encoded_size(data, mode)
        assert price(counts_of(data), mode).estimate == pytest.approx(exact, rel=tolerance)


@pytest.mark.parametrize(("mode", "least"), [("low", 0.81), ("high", 0.74)])
def test_how_far_the_bound_is_from_the_truth(mode, least):
    for zeros in (0, 0.5, 0.7):
        data = gaussian(1 << 18, 12, zeros)
        found = price(counts_of(data), mode).lower_bound
        assert least <= found / (8 * encoded_size(data, mode)) <= 1


@pytest.mark.parametrize("mode", [LOW, HIGH])
@pytest.mark.parametrize("first", [0.3, 0.8, 0.99, 1.0])
def test_codes_of_runs_against_counting(mode, first):
    """The closed forms of geometric runs against a long random sequence coded greedily."""
    rng = np.random.default_rng(0)
    is_first = rng.random(200_000) < first
    edges = np.flatnonzero(np.diff(np.r_[0, is_first, 0]))
    runs = edges[1::2] - edges[::2]
    nines = runs // 9 if mode is HIGH else np.zeros_like(runs)
    ones = -(-(runs - 9 * nines) // (4 if mode is HIGH else 2))
    share = np.zeros(256)
    share[0], share[255] = first, 1 - first
    codes = pricing._codes(share, mode)
    assert codes[0] == pytest.approx(ones.sum() / is_first.size, rel=0.05, abs=2e-4)
    assert codes[1] == pytest.approx(nines.sum() / is_first.size, rel=0.05, abs=2e-4)
    assert codes[3] == pytest.approx(1 - first)


@pytest.mark.parametrize("shares", [[1, 0, 0, 0], [0, 1, 0, 0], [0.5, 0.3, 0.1, 0.1]])
def test_word_ends_against_filling_words(shares):
    codes = np.random.default_rng(0).choice(4, 100_000, p=shares) + 1
    used, opened = 0, 0
    for units in codes.tolist():
        opened += used + units > 21
        used = units if used + units > 21 else used + units
    assert pricing._word_ends(np.array(shares))[0] == pytest.approx(opened / codes.size, rel=0.02)


def test_tiles_matter_and_labels_do_not():
    counts = counts_of(gaussian(1 << 15, 12, 0.5))
    assert price(np.roll(counts, 77)) == price(counts)
    small, large = price(counts, tile_bytes=512), price(counts)
    assert small.estimate > large.estimate
    assert small.lower_bound > large.lower_bound
    assert price(np.zeros(256, int)) == (0, 0)


@pytest.mark.parametrize(
    ("histogram", "mode", "tile", "message"),
    [
        ([1] * 255, "low", 512, "the histogram is int64 of shape .255,.; expected 256 counts"),
        ([0.5] * 256, "low", 512, "the histogram is float64 of shape"),
        ([0] * 255 + [-3], "low", 512, "the histogram counts byte 255 -3 times"),
        ([1] * 256, "middle", 512, "mode is 'middle'"),
        ([1] * 256, "low", 100, "100 raw bytes; expected a multiple of 512"),
    ],
)
def test_arguments(histogram, mode, tile, message):
    with pytest.raises(CodecError, match=message):
        price(histogram, mode, tile_bytes=tile)
