"""Blocks of 128 x 128 and groups of 128 in float8, beside an oracle of loops over Python floats."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.numerics.activation import GroupFloat8
from ms_quant.numerics.float8_blocks import (
    Float8BlockFormat,
    block_scales,
    by_block,
    by_row,
)
from ms_quant.numerics.storage import DTYPES

VALUES = sorted(
    float(value)
    for value in np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
)
BF16 = DTYPES["bfloat16"]


def slow_round(x: float) -> float:
    """The nearest value of E4M3, half to even; beyond the largest it."""
    magnitude = min(Fraction(abs(x)), Fraction(448))
    best = min(
        range(len(VALUES)), key=lambda i: (abs(Fraction(VALUES[i]) - magnitude), i % 2)
    )  # a code's last bit is its index's
    return math.copysign(VALUES[best], x)


def slow_scale(values: np.ndarray) -> np.float32:
    absmax = max((abs(float(v)) for v in values.ravel()), default=0.0)
    return np.float32(max(np.float32(absmax), np.float32(1e-12))) / np.float32(448)


def sample(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns), np.float32) * np.float32(0.05)
    x *= np.exp(rng.uniform(-6, 3, (rows, 1))).astype(np.float32)
    x[0, 0] = 0
    return x


@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (127, 128), (128, 256), (200, 384)])
def test_scales_are_those_of_the_blocks(rows: int, columns: int) -> None:
    weight = sample(rows, columns)
    grid = Float8BlockFormat().fit(weight, "w")
    assert grid.scale.shape == (rows, columns // 128)
    for i in range(rows):
        for j in range(columns // 128):
            first = i // 128 * 128
            block = weight[first : first + 128, j * 128 : (j + 1) * 128]
            assert grid.scale[i, j] == slow_scale(block)
    stored = by_block(grid.scale)
    assert stored.shape == (-(-rows // 128), columns // 128)
    np.testing.assert_array_equal(by_row(stored, rows), grid.scale)


def test_codes_are_the_nearest_values() -> None:
    weight = sample(130, 128, 1)
    grid = Float8BlockFormat().fit(weight, "w")
    found = grid.values(grid.round(weight))
    rng = np.random.default_rng(0)
    places = [*zip(rng.integers(0, 130, 150), rng.integers(0, 128, 150), strict=True), (0, 0)]
    for i, j in places:
        step = weight[i, j] / grid.scale[i, 0]
        assert found[i, j] == np.float32(slow_round(float(step))) * grid.scale[i, 0]


def test_scales_of_a_narrow_type_never_clip() -> None:
    weight = sample(256, 256, 2)
    grid = Float8BlockFormat().fit(weight, "w", BF16)
    assert (grid.scale == grid.scale.astype(BF16).astype(np.float32)).all()
    exact = by_row(block_scales(weight, "w"), 256)
    assert (grid.scale >= exact).all() and (grid.scale <= exact * np.float32(1 + 2**-7)).all()


def test_columns_one_by_one_are_the_whole() -> None:
    """As GPTQ rounds them, and takes the parameters of each group before its first column."""
    weight = sample(140, 256, 3)
    whole = Float8BlockFormat().fit(weight, "w")
    grid = Float8BlockFormat().fit(np.zeros_like(weight), "w")
    for start in (0, 128):
        grid.refit(weight[:, start : start + 128], start)
    np.testing.assert_array_equal(grid.scale, whole.scale)
    for column in (0, 127, 128, 255):
        one = grid.round(weight[:, column : column + 1], column)
        np.testing.assert_array_equal(one, whole.round(weight)[:, column : column + 1])


@pytest.mark.parametrize("shape", [(3, 128), (2, 5, 256), (384,), (0, 128)])
def test_each_group_of_a_token_has_its_scale(shape: tuple[int, ...]) -> None:
    x = sample(max(1, math.prod(shape[:-1])), shape[-1], 4).ravel()[: math.prod(shape)]
    x = x.reshape(shape)
    found = GroupFloat8().fake(x)
    assert found.shape == x.shape and found.dtype == np.float32
    for group, made in zip(x.reshape(-1, 128), found.reshape(-1, 128), strict=True):
        scale = slow_scale(group)
        for value, got in zip(group[::9], made[::9], strict=True):
            assert got == np.float32(slow_round(float(value / scale))) * scale


def test_what_is_refused() -> None:
    with pytest.raises(MsQuantError, match="w: groups of 128 do not divide K = 192"):
        Float8BlockFormat().check_columns(192, "w")
    Float8BlockFormat().check_columns(256, "w")
    with pytest.raises(MsQuantError, match="w: 1 of 16384 values are NaN or inf"):
        weight = sample(128, 128)
        weight[3, 4] = np.nan
        Float8BlockFormat().fit(weight, "w")
