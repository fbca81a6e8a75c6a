"""Formats and grids against the functions of the modules that define them, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ms_quant.errors import MsQuantError
from ms_quant.numerics import affine, groupwise, minifloat, mx, w4a8
from ms_quant.numerics.float_grid import DualMxFormat, Float8Format, MxFormat
from ms_quant.numerics.grid import (
    AffineFormat,
    AffineGrid,
    TwoLevelFormat,
    TwoLevelGrid,
    WeightFormat,
)
from ms_quant.numerics.groupwise import WHOLE, Parameters
from ms_quant.numerics.minifloat import E2M1
from ms_quant.numerics.mx_rules import RULES
from ms_quant.numerics.storage import DTYPES

F32 = DTYPES["float32"]
HALF_STEP = 0.5 + 2.0**-14  # see test_affine.py; fewer steps with 4 bits
G = 32
AFFINE = [
    AffineFormat(bits, group, symmetric)
    for bits in (8, 4)
    for group in (0, G)
    for symmetric in (True, False)
]
TENSOR = AffineFormat(8, per_tensor=True)
FOURS = [name for name, rule in RULES.items() if rule.element is E2M1]
DUALS = [DualMxFormat(rule, 2 * G) for rule in FOURS]
FORMATS = [
    *AFFINE,
    TENSOR,
    TwoLevelFormat(G),
    Float8Format(),
    *map(MxFormat, RULES),
    *DUALS,
]
SOME = [*AFFINE, TENSOR, TwoLevelFormat(G), Float8Format(), MxFormat(FOURS[0]), DUALS[0]]
INTEGER = [*AFFINE, TENSOR, TwoLevelFormat(G)]


def random_weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of very different sizes with outliers, a group of zeros and a row of zeros."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)) * np.exp(rng.standard_normal((rows, 1)))
    weight[rng.random(weight.shape) < 0.02] *= 20
    if rows > 2:
        weight[1] = 0
        weight[2, : min(G, columns)] = 0
    return weight.astype(np.float32)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal in type, shape and every bit, signs of zeros included."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


def affine_reference(format: AffineFormat, weight: np.ndarray):
    block = (1, format.group_size or WHOLE)
    by = groupwise.parameters(weight, block, "w", bits=format.bits, symmetric=format.symmetric)
    arrays = {"weight_scale": by.scale}
    if not format.symmetric:
        arrays["weight_zero_point"] = by.zero_point
    codes = groupwise.quantize(weight, by, "w")
    return codes, groupwise.dequantize(codes, by, "w"), arrays


def tensor_reference(weight: np.ndarray):
    by = groupwise.parameters(weight, (WHOLE, WHOLE), "w")
    codes = groupwise.quantize(weight, by, "w")
    scale = np.repeat(by.scale, len(weight), axis=0)
    return codes, groupwise.dequantize(codes, by, "w"), {"weight_scale": scale}


def reference(format: WeightFormat, weight: np.ndarray):
    """Codes, values and parameters by the modules that the format's class names."""
    if isinstance(format, AffineFormat):
        return tensor_reference(weight) if format.per_tensor else affine_reference(format, weight)
    if isinstance(format, TwoLevelFormat):
        absmax = np.abs(weight).max(axis=1, keepdims=True, initial=0)
        scale = affine.symmetric_scale(absmax, w4a8.PROTECTED)
        between = affine.quantize(weight, scale)
        by = groupwise.parameters(between, (1, format.group_size), "w", bits=4)
        codes = groupwise.quantize(between, by, "w")
        arrays = {"weight_scale": scale, "weight_scale_second": by.scale}
        return codes, groupwise.dequantize(codes, by, "w") * scale, arrays
    if isinstance(format, Float8Format):
        scale = minifloat.row_scale(weight)
        codes = minifloat.quantize_rows(weight, scale)
        return codes, minifloat.dequantize_rows(codes, scale), {"weight_scale": scale}
    rule = RULES[format.rule]
    if isinstance(format, MxFormat):
        codes, exponents = mx.quantize(weight, rule)
        values = mx.dequantize(codes, exponents, rule.element)
        return codes, values, {"weight_exponent": exponents}
    assert isinstance(format, DualMxFormat)
    dual = mx.quantize_dual(weight, rule, format.dual_block_size)
    values = mx.dequantize_dual(*dual, format.dual_block_size)
    arrays = {"weight_exponent": dual.exponents, "weight_dual_scale": dual.scales[..., 0]}
    return dual.codes, values, arrays


def check(format: WeightFormat, weight: np.ndarray) -> None:
    codes, values, arrays = reference(format, weight)
    grid = format.fit(weight, "w")
    same(grid.round(weight), codes)
    same(grid.values(codes), values)
    assert grid.arrays().keys() == arrays.keys()
    for name, expected in arrays.items():
        same(grid.arrays()[name], expected)


def label(format: WeightFormat) -> str:
    return str(format).replace("Format", "")


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("format", FORMATS, ids=label)
def test_is_the_reference(format, rows):
    check(format, random_weight(rows, 3 * G))
    check(format, np.zeros((rows, 2 * G), np.float32))


ANY_WIDTH = [f for f in FORMATS if not f.group_size or isinstance(f, MxFormat | DualMxFormat)]


@pytest.mark.parametrize("columns", [1, 7, 31, 33, 77])
@pytest.mark.parametrize("format", ANY_WIDTH, ids=label)
def test_odd_sizes(format, columns):
    """Microscaling pads a short last block, and a dual scale a short last long one, too."""
    check(format, random_weight(4, columns, columns))


@pytest.mark.parametrize("columns", [512, 520, 1024 + 40])
def test_long_blocks_of_512(columns):
    check(DualMxFormat("mxfp4_msmodelslim"), random_weight(3, columns))


@given(
    format=st.sampled_from(FORMATS),
    weight=hnp.arrays(np.float32, (2, 2 * G), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
)
@settings(deadline=None, max_examples=60)
def test_is_the_reference_for_any_floats(format, weight):
    check(format, weight)


@pytest.mark.parametrize("format", FORMATS, ids=label)
def test_columns_alone_are_as_in_the_whole(format):
    weight = random_weight(4, 4 * G, 3)
    grid = format.fit(weight, "w")
    codes = grid.round(weight)
    values = grid.values(codes)
    parts = [(j, j + 1) for j in range(4 * G)] + [(30, 34), (63, 128), (5, 100), (40, 40)]
    for start, stop in parts:
        same(grid.round(weight[:, start:stop], start), codes[:, start:stop])
        same(grid.values(codes[:, start:stop], start), values[:, start:stop])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("format", SOME, ids=label)
def test_stored_parameters_give_the_grid_back(format, dtype):
    weight = random_weight(4, 4 * G, 4)
    grid = format.fit(weight, "w", dtype)
    again = format.grid(grid.arrays())
    codes = grid.round(weight)
    same(again.round(weight), codes)
    same(again.values(codes), grid.values(codes))
    same(again.round(weight[:, 70:90], 70), codes[:, 70:90])
    for name, array in grid.arrays().items():
        same(again.arrays()[name], array)


def group_alone(format: WeightFormat, grid, columns: np.ndarray, start: int, dtype: np.dtype):
    """Parameters of one group from its columns; what longer blocks share is that of ``grid``."""
    if isinstance(format, TwoLevelFormat):
        between = affine.quantize(columns, grid.scale).astype(np.float32)
        return AffineFormat(4).fit(between, "w", dtype).scale
    if isinstance(format, DualMxFormat):
        shared = grid.scales[:, start // format.dual_block_size, None]
        return MxFormat(format.rule).fit(columns / shared, "w").exponents
    if isinstance(format, AffineFormat):
        alone = AffineFormat(format.bits, 0, format.symmetric).fit(columns, "w", dtype)
        return np.concatenate([alone.scale, alone.zero_point], axis=1)
    return format.fit(columns, "w").arrays()["weight_exponent"]


def parameters_of_groups(grid) -> np.ndarray:
    """(out, groups), or for affine grids (out, 2 * groups)."""
    if isinstance(grid, AffineGrid):
        return np.stack([grid.scale, grid.zero_point], axis=2).reshape(len(grid.scale), -1)
    if isinstance(grid, TwoLevelGrid):
        return grid.second.scale
    return grid.arrays()["weight_exponent"]


GROUPED = [f for f in FORMATS if f.group_size]
NARROW = [f for f in GROUPED if isinstance(f, AffineFormat | TwoLevelFormat)]


@pytest.mark.parametrize(
    ("format", "dtype"),
    [(f, F32) for f in GROUPED] + [(f, DTYPES["bfloat16"]) for f in NARROW],
    ids=str,
)
def test_a_group_refitted_is_as_fitted_alone(format, dtype):
    weight, other = random_weight(5, 4 * G, 5), random_weight(5, 4 * G, 6)
    other = other[:, 2 * G : 3 * G]
    grid = format.fit(weight, "w", dtype)
    before = parameters_of_groups(grid).copy()
    grid.refit(other, 2 * G)
    after = np.split(parameters_of_groups(grid), 4, axis=1)
    before = np.split(before, 4, axis=1)
    np.testing.assert_array_equal(after[2], group_alone(format, grid, other, 2 * G, dtype))
    assert (after[2] != before[2]).any()
    for kept in (0, 1, 3):
        np.testing.assert_array_equal(after[kept], before[kept])


@pytest.mark.parametrize("format", [f for f in SOME if not f.group_size], ids=label)
def test_a_whole_row_refitted_is_fitted_anew(format):
    grid = format.fit(random_weight(5, 40, 7), "w")
    grid.refit(random_weight(5, 40, 8), 0)
    for name, array in format.fit(random_weight(5, 40, 8), "w").arrays().items():
        same(grid.arrays()[name], array)


def test_a_short_last_block_is_refitted():
    grid = MxFormat("mxfp8_cann0").fit(random_weight(3, 40), "w")
    tail = random_weight(3, 8, 9)
    grid.refit(tail, 32)
    same(grid.exponents[:, 1:], mx.quantize(tail, RULES["mxfp8_cann0"]).exponents)


def slow_parameters(format: AffineFormat, row: np.ndarray, clip: float) -> tuple[float, int]:
    """Scale and zero point of one group in Python floats; the scale is float32 at the end."""
    smallest, largest = affine.LIMITS[format.bits]
    low = float(np.float32(min(0.0, *map(float, row))) * np.float32(clip))
    high = float(np.float32(max(0.0, *map(float, row))) * np.float32(clip))
    if format.symmetric:
        return np.float32(max(-low, high)) / np.float32(largest), 0
    scale = np.float32((high - low) / (largest - smallest))
    return scale, min(largest, max(smallest, round(smallest - low / float(scale))))


@pytest.mark.parametrize("shape", [None, (3, 1), "groups"])
@pytest.mark.parametrize("format", AFFINE, ids=label)
def test_clip_narrows_the_range(format, shape):
    weight = np.random.default_rng(8).standard_normal((3, 2 * G)).astype(np.float32)
    size = format.group_size or 2 * G
    count = 2 * G // size
    if shape is None:
        factor: np.ndarray | float = 0.55
        factors = np.full((3, count), 0.55, np.float32)
    else:
        wanted = (3, count) if shape == "groups" else shape
        factor = np.random.default_rng(9).uniform(0.5, 1, wanted).astype(np.float32)
        factors = np.broadcast_to(factor, (3, count))
    grid = format.fit(weight, "w", clip=factor)
    for n, g in np.ndindex(3, count):
        expected = slow_parameters(format, weight[n, g * size : (g + 1) * size], factors[n, g])
        assert (grid.scale[n, g], grid.zero_point[n, g]) == expected


def test_clip_of_two_levels_is_of_the_second():
    weight = random_weight(3, 2 * G)
    plain, clipped = (TwoLevelFormat(G).fit(weight, "w", clip=c) for c in (1.0, 0.5))
    same(clipped.scale, plain.scale)
    between = affine.quantize(weight, plain.scale).astype(np.float32)
    same(clipped.second.scale, AffineFormat(4, G).fit(between, "w", clip=0.5).scale)


def test_the_widest_row_decides_for_a_tensor():
    weight = np.float32([[1, 2], [-8, 4], [0, 0]])
    assert TENSOR.fit(weight, "w").scale.tolist() == [[np.float32(8) / np.float32(127)]] * 3
    assert TENSOR.fit(weight, "w", clip=0.5).scale[0, 0] == np.float32(4) / np.float32(127)


def below(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The next smaller number of a type, for positive ones."""
    bits = np.uint32 if dtype.itemsize == 4 else np.uint16
    return (x.astype(dtype).view(bits) - bits(1)).view(dtype).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("format", [*INTEGER, Float8Format()], ids=label)
def test_scales_are_the_least_stored_numbers_that_do_not_clip(format, dtype):
    weight = random_weight(6, 2 * G, 10)
    exact, found = format.fit(weight, "w"), format.fit(weight, "w", dtype)
    if isinstance(format, TwoLevelFormat):  # the second level follows from the first one's codes
        between = affine.quantize(weight, found.scale).astype(np.float32)
        second = AffineFormat(4, G).fit(between, "w")
        pairs = [(exact.scale, found.scale), (second.scale, found.second.scale)]
    else:
        pairs = [(exact.scale, found.scale)]
    for wanted, stored in pairs:
        assert stored.dtype == np.float32
        same(stored.astype(dtype).astype(np.float32), stored)
        assert (stored >= wanted).all()
        least = ml_dtypes.finfo(dtype).smallest_normal
        assert ((below(stored, dtype) < wanted) | (stored == np.float32(least))).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("format", [f for f in AFFINE if not f.symmetric], ids=label)
def test_zero_points_follow_from_stored_scales(format, dtype):
    weight = random_weight(5, 2 * G, 11)
    grid = format.fit(weight, "w", dtype)
    size = format.group_size or 2 * G
    smallest, largest = affine.LIMITS[format.bits]
    for n, g in np.ndindex(grid.scale.shape):
        low = min(0.0, float(weight[n, g * size : (g + 1) * size].min()))
        exact = round(smallest - low / float(grid.scale[n, g]))
        assert grid.zero_point[n, g] == min(largest, max(smallest, exact))
    by = Parameters(grid.scale, grid.zero_point, format.bits)
    same(grid.round(weight), groupwise.quantize(weight, by, "w"))
    assert (grid.values(grid.round(np.zeros_like(weight))) == 0).all()


def test_zero_points_are_rounded_once():
    """In float32 the quotient of one row in some thousands would be half a step too round."""
    weight = np.random.default_rng(13).standard_normal((300_000, 2)).astype(np.float32)
    found = AffineFormat(8, symmetric=False).fit(weight, "w")
    same(
        found.zero_point, groupwise.parameters(weight, (1, WHOLE), "w", symmetric=False).zero_point
    )


@given(
    format=st.sampled_from([*AFFINE, TENSOR]),
    dtype=st.sampled_from([F32, DTYPES["bfloat16"]]),
    weight=hnp.arrays(np.float32, (2, 2 * G), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
)
@settings(deadline=None, max_examples=60)
def test_the_error_is_at_most_half_a_step(format, dtype, weight):
    grid = format.fit(weight, "w", dtype)
    error = np.abs(weight - grid.values(grid.round(weight)).astype(np.float64))
    scale = np.repeat(grid.scale.astype(np.float64), 2 * G // grid.scale.shape[1], axis=1)
    assert (error <= scale * HALF_STEP).all()


@pytest.mark.parametrize("format", FORMATS, ids=label)
def test_zeros_stay_zeros(format):
    """In groups of nothing else as between other numbers."""
    weight = random_weight(4, 2 * G, 12)
    weight[:, ::3] = 0
    weight[3, G:] = 0
    grid = format.fit(weight, "w")
    assert (grid.values(grid.round(weight))[weight == 0] == 0).all()
    assert all(np.isfinite(array.astype(np.float64)).all() for array in grid.arrays().values())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", FORMATS, ids=label)
def test_what_is_not_finite_is_refused_by_name(format, value):
    weight = np.ones((2, 2 * G), np.float32)
    weight[1, 3] = value
    with pytest.raises(MsQuantError, match=r"^a\.weight: 1 of 128 values are NaN or inf"):
        format.fit(weight, "a.weight")


@pytest.mark.parametrize("format", [f for f in AFFINE if f.group_size], ids=label)
def test_a_group_that_is_not_finite_is_not_refitted(format):
    grid = format.fit(np.ones((1, 2 * G), np.float32), "a.weight")
    with pytest.raises(MsQuantError, match=r"^a\.weight: 32 of 32 values are NaN"):
        grid.refit(np.full((1, G), np.nan, np.float32), G)


@pytest.mark.parametrize("format", [AffineFormat(4, G), TwoLevelFormat(G)], ids=label)
def test_groups_that_do_not_divide_are_refused_by_name(format):
    with pytest.raises(MsQuantError, match=r"^a\.weight: groups of 32 do not divide K = 40$"):
        format.fit(np.ones((1, 40), np.float32), "a.weight")
    with pytest.raises(MsQuantError, match=r"^a\.weight: groups of 32 do not divide K = 40$"):
        format.check_columns(40, "a.weight")
    format.check_columns(64, "a.weight")


@pytest.mark.parametrize(
    ("format", "good", "bad"),
    [
        (MxFormat("mxfp4_cann0", 64), 128, 96),
        (MxFormat("mxfp4_cann0", 2), 34, 33),
        (DualMxFormat("mxfp4_cann0"), 34, 33),
    ],
    ids=label,
)
def test_columns_that_cannot_be_packed_are_refused_by_name(format, good, bad):
    format.check_columns(good, "a.weight")
    with pytest.raises(MsQuantError, match=rf"^a\.weight: groups of \d+ do not divide K = {bad}$"):
        format.check_columns(bad, "a.weight")


@pytest.mark.parametrize("format", [AffineFormat(), Float8Format(), MxFormat("mxfp8_cann0")])
def test_any_number_of_columns_will_do(format):
    format.check_columns(33, "a.weight")


def test_a_scale_beyond_the_stored_type_is_refused_by_name():
    weight = np.full((1, 32), 1e9, np.float32)
    for format in (AffineFormat(), TwoLevelFormat(G), Float8Format()):
        with pytest.raises(MsQuantError, match=r"^a_scale: .* does not fit float16"):
            format.fit(weight, "a", DTYPES["float16"])
