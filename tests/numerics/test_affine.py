"""Affine int8 against exact arithmetic: fractions, Python loops, and bounds derived here."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ms_quant.errors import MsQuantError
from ms_quant.numerics import affine

TINY = float(np.finfo(np.float32).tiny)
HUGE = float(np.finfo(np.float32).max)
# At most 256 steps pass through four float32 roundings (the scale, the division, the addition of
# the zero point, the product of dequantize), each off by 2**-24 of its size at most: together
# 4 * 256 * 2**-24 steps. Half a step is the quantization itself.
HALF_STEP = 0.5 + 2.0**-14

FLOATS = st.floats(-HUGE, HUGE, width=32)


def rows_and_columns(low: int = 0, high: int = 9):
    return hnp.array_shapes(min_dims=2, max_dims=2, min_side=low, max_side=high)


def round_half_even(x: Fraction) -> int:
    floor = x.numerator // x.denominator
    rest = x - floor
    up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and floor % 2 == 1)
    return floor + up


def exact_code(x: float, scale: float, zero_point: int) -> int:
    """The code without any float rounding."""
    return min(127, max(-128, round_half_even(Fraction(x) / Fraction(scale) + zero_point)))


@pytest.mark.parametrize(
    ("x", "code"),
    [
        (0.0, 0),
        (-0.0, 0),
        (0.5, 0),  # tie to even
        (1.5, 2),  # tie to even
        (2.5, 2),  # tie to even
        (-0.5, 0),  # tie to even
        (-1.5, -2),  # tie to even
        (0.50000006, 1),  # the float32 after 0.5
        (126.5, 126),  # tie to even
        (127.0, 127),
        (127.49, 127),
        (127.5, 127),  # rounds to 128, clips
        (1e30, 127),  # clips, does not wrap
        (-128.0, -128),
        (-128.5, -128),  # tie to even
        (-129.0, -128),  # clips
        (-1e30, -128),
        (HUGE, 127),
        (1e-45, 0),  # the smallest subnormal
    ],
)
def test_rounding_and_clipping(x, code):
    assert affine.quantize(np.array([x], np.float32), 1.0) == code


@pytest.mark.parametrize(
    ("x", "zero_point", "code"),
    [
        (0.0, -128, -128),
        (0.0, 127, 127),
        (0.5, 1, 2),  # 1.5: the zero point is added before rounding, so this tie goes to 2
        (1.5, 1, 2),  # 2.5: tie to even, where rounding first would have given 3
        (-0.5, 0, 0),
        (255.0, -128, 127),
        (256.0, -128, 127),  # clips
    ],
)
def test_zero_point_is_added_before_rounding(x, zero_point, code):
    assert affine.quantize(np.array([x], np.float32), 1.0, zero_point) == code


def test_divides_and_does_not_multiply_by_a_reciprocal():
    """7.5 * 0.1 / 0.1 in float32: the quotient is a tie, the product with 1/scale is not."""
    differ = 0
    for k in range(-127, 127):
        for scale in np.float32([0.1, 0.3, 0.7, 3.0, 1e-3]):
            x = np.float32(k + 0.5) * scale
            quotient = int(np.rint(x / scale))
            assert affine.quantize(np.array([x], np.float32), scale)[0] == quotient
            differ += quotient != int(np.rint(x * (np.float32(1) / scale)))
    assert differ > 0, "the values above no longer tell a division from a reciprocal"


@pytest.mark.parametrize(
    ("absmax", "scale"),
    [
        (127.0, 1.0),
        (1.0, np.float32(1) / np.float32(127)),  # absmax / 127, not 2 * absmax / 255
        (0.0, 1.0),  # an all-zero slice
        (1e-45, 1.0),  # the quotient underflows to 0
        (8.9e-44, 1.0),  # a subnormal scale of one bit would clip 190 steps to 127
        (1e-36, 1.0),  # 7.9e-39 is subnormal
        (2e-36, np.float32(2e-36) / np.float32(127)),
        (HUGE, np.float32(HUGE) / np.float32(127)),
    ],
)
def test_symmetric_scale(absmax, scale):
    found = affine.symmetric_scale(np.float32(absmax))
    assert found == np.float32(scale)
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (-128.0, 127.0, 1.0, 0),
        (0.0, 255.0, 1.0, -128),
        (-255.0, 0.0, 1.0, 127),
        (0.5, 3.0, 3 / 255, -128),  # range made to include 0: unclamped it would be -179
        (3.0, 3.0, 3 / 255, -128),  # constant and positive
        (-3.0, -3.0, 3 / 255, 127),  # constant and negative
        (0.0, 0.0, 1.0, -128),  # nothing but zeros; 0 is still exact
        (-1e-40, 1e-40, 1.0, -128),  # subnormal range: as zeros
        (-0.25, 254.75, 1.0, -128),  # -127.75 rounds to -128
        (-0.5, 254.5, 1.0, -128),  # -127.5: tie to even
        (-1.5, 253.5, 1.0, -126),  # -126.5: tie to even
        (-3e38, 3e38, 6e38 / 255, 0),  # high - low would overflow float32; -0.5 ties to 0
        (-HUGE, HUGE, 2 * HUGE / 255, 0),
    ],
)
def test_asymmetric_parameters(low, high, scale, zero_point):
    found_scale, found_zero = affine.asymmetric_parameters(np.float32(low), np.float32(high))
    assert found_scale == pytest.approx(scale, rel=2.0**-23)
    assert int(found_zero) == zero_point
    assert found_scale.dtype == np.float32
    assert found_zero.dtype == np.int8


def assert_within_half_step(x: np.ndarray, scale: np.ndarray, zero_point=0) -> None:
    q = affine.quantize(x, scale, zero_point)
    with np.errstate(over="ignore"):  # 127.5 steps of the largest scale is inf in float32
        back = affine.dequantize(q, scale, zero_point).astype(np.float64)
    keep = np.isfinite(back)
    assert q.dtype == np.int8
    error = np.abs(back - x.astype(np.float64))
    assert (error[keep] <= (np.broadcast_to(scale, x.shape) * HALF_STEP)[keep]).all()


@given(hnp.arrays(np.float32, rows_and_columns(), elements=FLOATS))
@settings(deadline=None)
def test_per_channel_error_is_half_a_step(weight):
    scale = affine.per_channel_scale(weight)
    assert scale.shape == (len(weight), 1)
    assert (scale >= TINY).all()
    assert_within_half_step(weight, scale)


@given(hnp.arrays(np.float32, rows_and_columns(), elements=FLOATS))
@settings(deadline=None)
def test_per_token_error_is_half_a_step(x):
    scale = affine.per_token_scale(x[None])
    assert scale.shape == (1, len(x), 1)
    assert_within_half_step(x[None], scale)


@given(hnp.arrays(np.float32, rows_and_columns(1), elements=FLOATS))
@settings(deadline=None)
def test_asymmetric_error_is_half_a_step_and_zero_is_exact(x):
    scale, zero_point = affine.asymmetric_parameters(x.min(), x.max())
    assert_within_half_step(x, scale, zero_point)
    zero = affine.quantize(np.zeros(1, np.float32), scale, zero_point)
    assert zero == zero_point
    assert affine.dequantize(zero, scale, zero_point) == 0


@given(
    x=hnp.arrays(np.float32, st.integers(0, 7), elements=st.floats(-400, 400, width=32)),
    scale=st.floats(2.0**-10, 16, width=32),
    zero_point=st.integers(-128, 127),
)
@settings(deadline=None)
def test_codes_are_those_of_exact_arithmetic(x, scale, zero_point):
    """Equal to fractions, but where float32 rounding crosses a tie: there by one."""
    codes = affine.quantize(x, scale, zero_point)
    for value, code in zip(x.tolist(), codes.tolist(), strict=True):
        steps = Fraction(value) / Fraction(scale) + zero_point
        from_tie = abs(steps - round_half_even(steps - Fraction(1, 2)) - Fraction(1, 2))
        slack = 2.0**-24 * (2 * abs(value / scale) + abs(zero_point)) * (1 + 2.0**-20)
        exact = exact_code(value, scale, zero_point)
        assert code == exact or (from_tie <= slack and abs(code - exact) == 1)


@given(q=hnp.arrays(np.int8, st.integers(0, 20)), zero_point=st.integers(-128, 127))
@settings(deadline=None)
def test_a_code_decoded_and_encoded_is_itself(q, zero_point):
    for scale in np.float32([1.0, 0.1, 3.0, TINY, 1e36]):
        back = affine.dequantize(q, scale, zero_point)
        np.testing.assert_array_equal(affine.quantize(back, scale, zero_point), q)


def test_every_row_has_its_own_scale_and_zero_rows_have_one():
    weight = np.float32([[0, 0, 0], [1, -2, 0.5], [-127, 3, 0]])
    np.testing.assert_array_equal(
        affine.per_channel_scale(weight)[:, 0], [1, np.float32(2) / np.float32(127), 1]
    )
    codes = affine.quantize(weight, affine.per_channel_scale(weight))
    assert codes[0].tolist() == [0, 0, 0]
    assert codes[1, 1] == -127
    assert codes[2].tolist() == [-127, 3, 0]


def test_clip_scales_each_rows_range():
    weight = np.float32([[4, -8], [4, -8]])
    scale = affine.per_channel_scale(weight, np.float32([[1.0], [0.5]]))
    np.testing.assert_array_equal(scale[:, 0], np.float32([8, 4]) / np.float32(127))
    codes = affine.quantize(weight, scale)
    assert codes.tolist() == [[64, -127], [127, -128]]  # 63.5 ties to 64; -254 clips


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_inputs_are_widened_first(dtype):
    x = np.array([[60000.0, -60000.0, 1.0, 0.0]], dtype)
    wide = x.astype(np.float32)
    np.testing.assert_array_equal(affine.per_token_scale(x), affine.per_token_scale(wide))
    np.testing.assert_array_equal(affine.per_channel_scale(x), affine.per_channel_scale(wide))
    scale = affine.per_token_scale(wide)
    np.testing.assert_array_equal(affine.quantize(x, scale), affine.quantize(wide, scale))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nan_and_inf_are_refused_by_name(bad, dtype):
    x = np.ones((3, 5), dtype)
    x[1, 2] = bad
    with pytest.raises(MsQuantError, match=r"^model\.w: 1 of 15 values are NaN or inf"):
        affine.check_finite(x, "model.w")


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 3)])
def test_finite_values_and_empty_arrays_pass(shape):
    affine.check_finite(np.zeros(shape, np.float32), "x")


def slow_matmul(qx: np.ndarray, qw: np.ndarray) -> list[list[int]]:
    return [
        [sum(int(a) * int(b) for a, b in zip(row, weight, strict=True)) for weight in qw]
        for row in qx
    ]


@given(
    rows=st.integers(0, 3), outs=st.integers(1, 3), inner=st.integers(1, 40), seed=st.integers(0)
)
@settings(deadline=None)
def test_integer_matmul_is_exact(rows, outs, inner, seed):
    rng = np.random.default_rng(seed)
    qx = rng.integers(-128, 128, (rows, inner)).astype(np.int8)
    qw = rng.integers(-128, 128, (outs, inner)).astype(np.int8)
    found = affine.integer_matmul(qx, qw)
    assert found.dtype == np.int32
    assert found.shape == (rows, outs)
    assert found.tolist() == slow_matmul(qx, qw)


@pytest.mark.parametrize("inner", [1, 1024, 1025, 65_536])
def test_integer_matmul_of_extreme_codes(inner):
    low = np.full((1, inner), -128, np.int8)
    high = np.full((1, inner), 127, np.int8)
    assert affine.integer_matmul(low, low)[0, 0] == inner * 2**14
    assert affine.integer_matmul(low, high)[0, 0] == -inner * 128 * 127
