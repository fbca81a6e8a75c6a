"""W4A8's correction and two-level scales against exact sums and loops."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ms_quant.errors import MsQuantError
from ms_quant.numerics import w4a8
from ms_quant.numerics.grid import TwoLevelFormat, TwoLevelGrid
from ms_quant.numerics.storage import DTYPES
from ms_quant.numerics.w4a8 import ROW_PARALLEL_SLICES as SLICES

RNG = np.random.default_rng(0)
CODES = RNG.integers(-8, 8, (3, 64)).astype(np.int8)


def exact(codes: np.ndarray, scale: np.ndarray, slices: int) -> list[list[float]]:
    """8 * sum(code * scale) of each slice in fractions, rounded once."""
    rows, columns = codes.shape
    group, part = columns // scale.shape[1], columns // slices
    return [
        [
            float(
                np.float32(
                    float(
                        8
                        * sum(
                            int(codes[n, k]) * Fraction(float(scale[n, k // group]))
                            for k in range(s * part, (s + 1) * part)
                        )
                    )
                )
            )
            for s in range(slices)
        ]
        for n in range(rows)
    ]


@dataclass
class TwoLevel:
    """A weight on the grid of two scales."""

    codes: np.ndarray
    grid: TwoLevelGrid

    @property
    def scale(self) -> np.ndarray:
        return self.grid.scale

    @property
    def second(self) -> np.ndarray:
        return self.grid.second.scale

    def dequantize(self) -> np.ndarray:
        return self.grid.values(self.codes)

    def scale_bias(self, name: str, slices: int = 1) -> np.ndarray:
        return w4a8.scale_bias(
            self.codes, self.second.astype(np.float64) * self.scale, name, slices
        )


def two_level(
    weight: np.ndarray, group: int, name: str, dtype: np.dtype = DTYPES["float32"]
) -> TwoLevel:
    grid = TwoLevelFormat(group).fit(weight, name, dtype)
    return TwoLevel(grid.round(weight), grid)


@pytest.mark.parametrize("slices", [1, SLICES])
@pytest.mark.parametrize("groups", [1, 4, 32])
def test_scale_bias_is_the_exact_sum(slices, groups):
    scale = RNG.random((3, groups), np.float32) + np.float32(1e-3)
    found = w4a8.scale_bias(CODES, scale, "w", slices)
    assert found.dtype == np.float32
    assert found.shape == (3, slices)
    assert found.tolist() == exact(CODES, scale, slices)


def test_scale_bias_by_hand():
    codes = np.array([[1, 2, -8, 7]], np.int8)
    scale = np.array([[0.5]], np.float32)
    assert w4a8.scale_bias(codes, scale, "w").tolist() == [[8.0]]  # 8 * 2 * 0.5
    assert w4a8.scale_bias(codes, scale, "w", 2).tolist() == [[12.0, -4.0]]
    groups = np.array([[0.5, 2.0]], np.float32)
    assert w4a8.scale_bias(codes, groups, "w").tolist() == [[-4.0]]  # 8 * (1.5 - 2)


@pytest.mark.parametrize("row", range(3))
def test_why_there_is_a_correction(row):
    """int8 activations in two int4 halves, the low one read 8 too low."""
    x = RNG.integers(-128, 128, 64)
    high, low = x >> 4, x & 15
    w = CODES[row].astype(np.int64)
    ones = np.ones((1, 1), np.float32)
    correction = w4a8.scale_bias(CODES[row : row + 1], ones, "w")[0, 0]
    assert x @ w == 16 * (high @ w) + (low - 8) @ w + correction


@settings(max_examples=30, deadline=None)
@given(
    weight=hnp.arrays(np.float32, (2, 8), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    group=st.sampled_from([1, 2, 4, 8]),
)
def test_two_levels_stay_within_two_half_steps(weight, group):
    found = two_level(weight, group, "w")
    assert found.codes.dtype == np.int8
    assert np.abs(found.codes).max(initial=0) <= 7
    assert found.scale.shape == (2, 1)
    assert found.second.shape == (2, 8 // group)
    assert np.all(found.second <= 17)  # 119 / 7, or 1
    first = found.scale.astype(np.float64)
    second = np.repeat(found.second, group, axis=1)
    error = np.abs(weight - found.dequantize().astype(np.float64))
    # half an int8 step, and half an int4 step counted in int8 ones; roundings as in test_affine.py
    assert np.all(error <= first * (0.5 + 0.5 * second) * (1 + 2.0**-12))


def test_two_levels_by_hand():
    weight = np.array([[119, -34, 7, 3, 0, 0]], np.float32)
    found = two_level(weight, 2, "w")
    assert found.scale.tolist() == [[1.0]]
    assert found.second.tolist() == [[17.0, 1.0, 1.0]]  # the last group is all zeros
    assert found.codes.tolist() == [[7, -2, 7, 3, 0, 0]]
    assert found.dequantize().tolist() == weight.tolist()
    assert found.scale_bias("w").tolist() == [[8 * 95.0]]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_scales_are_rounded_up_to_the_stored_type_before_use(dtype):
    weight = RNG.standard_normal((3, 64)).astype(np.float32)
    exact, found = (two_level(weight, 16, "w", d) for d in (DTYPES["float32"], dtype))
    for scale in (found.scale, found.second):
        assert scale.dtype == np.float32
        np.testing.assert_array_equal(scale.astype(dtype).astype(np.float32), scale)
    assert np.all(found.scale >= exact.scale)
    second = np.repeat(found.second.astype(np.float64), 16, axis=1)
    error = np.abs(weight - found.dequantize().astype(np.float64))
    assert np.all(error <= found.scale * (0.5 + 0.5 * second) * (1 + 2.0**-12))


def test_refuses_scales_beyond_the_stored_type():
    with pytest.raises(MsQuantError, match=r"w_scale: .* does not fit float16"):
        two_level(np.full((1, 2), 1e9, np.float32), 2, "w", DTYPES["float16"])


def test_two_level_scale_bias_is_exact():
    found = two_level(RNG.standard_normal((3, 64)), 16, "w")
    both = found.second.astype(np.float64) * found.scale
    assert found.scale_bias("w", SLICES).tolist() == exact(found.codes, both, SLICES)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    found = two_level(np.zeros((rows, 32), np.float32), 16, "w")
    assert found.dequantize().shape == (rows, 32)
    assert found.scale_bias("w", SLICES).tolist() == [[0.0] * SLICES] * rows


def test_refusals():
    ones = np.ones((3, 1), np.float32)
    with pytest.raises(MsQuantError, match="w: 16 slices do not divide K = 60"):
        w4a8.scale_bias(CODES[:, :60], ones, "w", SLICES)
    for shape in [(3, 5), (2, 1), (3,), (3, 0)]:
        with pytest.raises(MsQuantError, match=r"w: scales of .* do not divide codes of \(3, 64\)"):
            w4a8.scale_bias(CODES, np.ones(shape, np.float32), "w")
    with pytest.raises(MsQuantError, match="w: groups of 256 do not divide K = 64"):
        two_level(CODES.astype(np.float32), 256, "w")
    with pytest.raises(MsQuantError, match="w: 1 of 2 values are NaN or inf"):
        two_level(np.array([[1, np.nan]]), 2, "w")
