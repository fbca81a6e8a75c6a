"""The small floats against a search over every number they have, in exact fractions."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ms_quant.errors import MsQuantError
from ms_quant.numerics import minifloat
from ms_quant.numerics.minifloat import E2M1, E4M3, Rounding
from ms_quant.numerics.pack import pack_nibbles, unpack_nibbles

HUGE = float(np.finfo(np.float32).max)
FLOATS = st.floats(-HUGE, HUGE, width=32)
BELOW_HALF = float(np.nextafter(np.float32(0.5), np.float32(0)))
E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3_value(code: int) -> Fraction:
    """By the specification: bits s eeee mmm, bias 7; exponent field 0 is subnormal."""
    field, mantissa = code >> 3 & 15, code & 7
    size = Fraction(8 + mantissa if field else mantissa, 8) * Fraction(2) ** (max(field, 1) - 7)
    return -size if code >> 7 else size


POSITIVE = {
    "float8_e4m3fn": [e4m3_value(code) for code in range(0x7F)],
    "float4_e2m1fn": [Fraction(value) for value in E2M1_VALUES],
}


def oracle(x: float, format: minifloat.Minifloat, rounding: Rounding) -> int:
    """The code, by looking at every number of the format."""
    values = POSITIVE[format.dtype.name]
    size = Fraction(abs(x))
    distance = min(abs(value - size) for value in values)
    nearest = [code for code, value in enumerate(values) if abs(value - size) == distance]
    if rounding is Rounding.HALF_EVEN:
        code = nearest[0] if nearest[0] % 2 == 0 else nearest[-1]
    else:
        code = nearest[-1]
        if size == Fraction(BELOW_HALF) * values[1]:  # its sum with one half is 1 in float32
            code = 1
    return code | (np.signbit(np.float32(x)) * (len(values) + 1 & ~1)).item()


@pytest.mark.parametrize("rounding", Rounding)
@pytest.mark.parametrize("format", [E4M3, E2M1])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_float_becomes_the_nearest_number(format, rounding, data):
    x = data.draw(st.one_of(FLOATS, st.floats(-500, 500, width=32), st.floats(-8, 8, width=32)))
    assert minifloat.encode([x], format, rounding)[0] == oracle(x, format, rounding)


@pytest.mark.parametrize("rounding", Rounding)
@pytest.mark.parametrize("format", [E4M3, E2M1])
def test_every_tie_and_its_neighbours(format, rounding):
    values = np.array(POSITIVE[format.dtype.name], np.float32)
    ties = (values[1:] + values[:-1]) / 2
    ends = (np.float32(0), np.float32(np.inf))
    x = np.concatenate([ties, *(np.nextafter(ties, end) for end in ends), values])
    x = np.concatenate([x, -x])
    expected = [oracle(float(v), format, rounding) for v in x]
    assert minifloat.encode(x, format, rounding).tolist() == expected


@pytest.mark.parametrize(
    ("x", "even", "away"),
    [
        (0.25, 0.0, 0.5),  # tie: code 0 is even
        (BELOW_HALF / 2, 0.0, 0.5),  # below the tie; 0.49999997 + 0.5 is 1 in float32
        (0.75, 1.0, 1.0),  # tie: code 2 is even, and it is the larger
        (1.25, 1.0, 1.5),  # tie: code 2 is even
        (1.75, 2.0, 2.0),  # tie across a power of two
        (2.5, 2.0, 3.0),  # tie: code 4 is even
        (3.5, 4.0, 4.0),  # tie across a power of two
        (5.0, 4.0, 6.0),  # tie: code 6 is even
        (7.0, 6.0, 6.0),  # saturates
        (HUGE, 6.0, 6.0),
        (1e-45, 0.0, 0.0),  # a subnormal float32
    ],
)
def test_golden_e2m1(x, even, away):
    for sign in (1, -1):
        for rounding, value in ((Rounding.HALF_EVEN, even), (Rounding.HALF_AWAY, away)):
            decoded = minifloat.decode(minifloat.encode([sign * x], E2M1, rounding), E2M1)
            assert decoded == sign * value
            assert np.signbit(decoded) == (sign < 0)  # -0 stays negative


@pytest.mark.parametrize(
    ("x", "even", "away"),
    [
        (448.0, 0x7E, 0x7E),  # the largest
        (464.0, 0x7E, 0x7E),  # would be a tie with 480, which is NaN: saturates
        (1e9, 0x7E, 0x7E),
        (2.0**-9, 0x01, 0x01),  # the smallest
        (2.0**-10, 0x00, 0x01),  # tie with zero
        (3 * 2.0**-10, 0x02, 0x02),  # tie of subnormals
        (7.5 * 2.0**-9, 0x08, 0x08),  # tie of the last subnormal and the first normal number
        (1.0, 0x38, 0x38),
        (1.0625, 0x38, 0x39),  # tie: 0x38 is even
        (1.1875, 0x3A, 0x3A),  # tie: 0x3A is even
        (-0.0, 0x80, 0x80),
    ],
)
def test_golden_e4m3(x, even, away):
    assert minifloat.encode([x], E4M3, Rounding.HALF_EVEN) == even
    assert minifloat.encode([x], E4M3, Rounding.HALF_AWAY) == away


@pytest.mark.parametrize("rounding", Rounding)
def test_every_code_comes_back(rounding):
    e4m3 = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    values = minifloat.decode(e4m3, E4M3)
    assert values.tolist() == [e4m3_value(int(code)) for code in e4m3]
    np.testing.assert_array_equal(minifloat.encode(values, E4M3, rounding), e4m3)
    e2m1 = np.arange(16, dtype=np.uint8)
    values = minifloat.decode(e2m1, E2M1)
    assert values.tolist() == E2M1_VALUES + [-value for value in E2M1_VALUES]
    np.testing.assert_array_equal(minifloat.encode(values, E2M1, rounding), e2m1)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code_is_refused(code):
    with pytest.raises(MsQuantError, match=r"w: 1 of 2 values are NaN or inf"):
        minifloat.decode(np.array([0, code], np.uint8), E4M3, "w")


@pytest.mark.parametrize("format", [E4M3, E2M1])
def test_half_even_agrees_with_ml_dtypes(format):
    """On all positive and negative bfloat16 and float16 numbers up to the largest."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        x = bits.view(dtype).astype(np.float32)
        x = x[np.abs(x) <= format.largest]
        expected = x.astype(format.dtype).view(np.uint8)
        np.testing.assert_array_equal(minifloat.encode(x, format), expected)


@given(hnp.arrays(np.float32, 20, elements=st.floats(2.0**-126, HUGE, width=32)))
def test_floor_log2_is_exact(x):
    for value, exponent in zip(x.tolist(), minifloat.floor_log2(x).tolist(), strict=True):
        assert Fraction(2) ** exponent <= Fraction(value) < Fraction(2) ** (exponent + 1)


def test_floor_log2_of_zero_and_subnormals():
    assert minifloat.floor_log2([0.0, 1e-45, 2.0**-127]).tolist() == [-200, -149, -127]


ROWS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9),
    elements=st.one_of(FLOATS, st.floats(-1, 1, width=32), st.just(0.0)),
)


@settings(deadline=None)
@given(ROWS)
def test_rows_within_the_bound_and_stable(x):
    scale = minifloat.row_scale(x)
    codes = minifloat.quantize_rows(x, scale)
    back = minifloat.dequantize_rows(codes, scale)
    # Half a step: 2**-4 of a normal number, 2**-10 of the scale of a subnormal one. The scale, the
    # division and the product are off by 2**-24 of the value each; a product may be subnormal.
    wide, steps = x.astype(np.float64), scale.astype(np.float64)
    bound = np.maximum(np.abs(wide) * 2.0**-4, steps * 2.0**-10) + np.abs(wide) * 2.0**-22
    assert np.all(np.abs(back - wide) <= bound)
    again = minifloat.quantize_rows(back, minifloat.row_scale(back))
    np.testing.assert_array_equal(again, codes)


def test_golden_rows():
    x = np.array([[448, -224, 1.0625], [0, -0.0, 0], [1e-13, 0, -1e-12]], np.float32)
    scale = minifloat.row_scale(x)
    floor = np.float32(1e-12) / np.float32(448)
    np.testing.assert_array_equal(scale, np.array([[1], [floor], [floor]], np.float32))
    codes = minifloat.quantize_rows(x, scale)
    assert codes[0].tolist() == [0x7E, 0xF6, 0x38]  # 1.0625 is a tie, to even
    assert codes[1].tolist() == [0x00, 0x80, 0x00]  # the floor keeps 0 / 0 away
    assert codes[2].tolist() == [0x63, 0x00, 0xFE]  # 44.8 -> 44: below the floor, still graded


def test_a_row_without_columns():
    x = np.zeros((2, 0), np.float32)
    scale = minifloat.row_scale(x)
    assert scale.shape == (2, 1) and np.all(scale > 0)
    assert minifloat.quantize_rows(x, scale).shape == (2, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_numbers_that_are_not_finite_are_refused(bad):
    x = np.array([[1.0, bad]])  # float64: 1e39 is infinite in float32
    for call in (
        lambda: minifloat.encode(x, E2M1, name="mlp.up"),
        lambda: minifloat.row_scale(x, "mlp.up"),
        lambda: minifloat.quantize_rows(x, np.ones((1, 1), np.float32), "mlp.up"),
    ):
        with pytest.raises(MsQuantError, match=r"mlp\.up: 1 of 2 values are NaN or inf"):
            call()


def test_packing_puts_the_first_code_low():
    codes = np.array([[0x1, 0xF, 0x3], [0x8, 0x0, 0xA]], np.uint8)
    packed = pack_nibbles(codes, "w")
    assert packed.tolist() == [[0xF1, 0x03], [0x08, 0x0A]]
    np.testing.assert_array_equal(unpack_nibbles(packed, 3, "w"), codes)
    assert codes.tolist() == [[0x1, 0xF, 0x3], [0x8, 0x0, 0xA]]  # the argument is left alone


@given(
    hnp.arrays(np.uint8, hnp.array_shapes(max_dims=3, min_side=0), elements=st.integers(0, 15)),
)
def test_packing_comes_back(codes):
    packed = pack_nibbles(codes, "w")
    assert packed.shape == (*codes.shape[:-1], (codes.shape[-1] + 1) // 2)
    np.testing.assert_array_equal(unpack_nibbles(packed, codes.shape[-1], "w"), codes)


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(MsQuantError, match=r"w: code 16 does not fit 4 bits"):
        pack_nibbles(np.array([3, 16], np.uint8), "w")
    with pytest.raises(MsQuantError, match=r"w: 2 bytes along the last axis, expected 3 for 5"):
        unpack_nibbles(np.zeros((1, 2), np.uint8), 5, "w")
