"""Blocks of any shape against Python loops, and the bound of half a step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ms_quant.errors import MsQuantError
from ms_quant.numerics import affine, groupwise
from ms_quant.numerics.groupwise import WHOLE

HALF_STEP = 0.5 + 2.0**-14  # see test_affine.py; fewer steps with 4 bits
BLOCKS = [(WHOLE, WHOLE), (1, WHOLE), (1, 4), (1, 1), (WHOLE, 1), (3, 2)]
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


def oracle(x: np.ndarray, counts: tuple[int, ...], bits: int, symmetric: bool):
    """Codes, scales and zero points of a matrix, one block and one value at a time."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = np.zeros(x.shape, np.int8)
    scales, zeros = np.zeros(counts, np.float32), np.zeros(counts, np.int8)
    tall, wide = (size // count for size, count in zip(x.shape, counts, strict=True))
    for i, j in itertools.product(*map(range, counts)):
        rows, columns = slice(i * tall, (i + 1) * tall), slice(j * wide, (j + 1) * wide)
        values = [float(value) for value in x[rows, columns].ravel()]
        if symmetric:
            scale = np.float32(max(abs(value) for value in values)) / np.float32(high)
        else:
            scale = np.float32((max(*values, 0.0) - min(*values, 0.0)) / (high - low))
        scale = scale if scale >= np.finfo(np.float32).tiny else np.float32(1)
        start = 0 if symmetric else round(low - min(*values, 0.0) / float(scale))
        start = min(high, max(low, start))
        steps = [np.float32(v) / scale + np.float32(start) for v in values]
        block = [min(high, max(low, round(float(step)))) for step in steps]
        codes[rows, columns] = np.reshape(block, (tall, wide))
        scales[i, j], zeros[i, j] = scale, start
    return codes, scales, zeros


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", BLOCKS)
@settings(max_examples=15, deadline=None)
@given(x=hnp.arrays(np.float32, (3, 8), elements=FLOATS))
def test_equals_loops_and_stays_within_half_a_step(block, bits, symmetric, x):
    by = groupwise.parameters(x, block, "w", bits=bits, symmetric=symmetric)
    found = groupwise.quantize(x, by, "w")
    codes, scales, zeros = oracle(x, by.scale.shape, bits, symmetric)
    np.testing.assert_array_equal(by.scale, scales)
    np.testing.assert_array_equal(by.zero_point, zeros)
    np.testing.assert_array_equal(found, codes)
    assert (found.dtype, by.scale.dtype, by.zero_point.dtype) == (np.int8, np.float32, np.int8)
    back = groupwise.dequantize(found, by, "w").astype(np.float64)
    step = np.kron(by.scale.astype(np.float64), np.ones(np.array(x.shape) // by.scale.shape))
    assert np.all(np.abs(x - back) <= step * HALF_STEP)


@pytest.mark.parametrize(
    ("shape", "block", "scales"),
    [
        ((4, 6), (WHOLE, WHOLE), (1, 1)),
        ((4, 6), (1, WHOLE), (4, 1)),
        ((4, 6), (1, 3), (4, 2)),
        ((1, 6), (1, 6), (1, 1)),
        ((2, 4, 6), (1, 1, WHOLE), (2, 4, 1)),
        ((0, 6), (1, 3), (0, 2)),  # no rows
        ((0, 6), (WHOLE, 1), (1, 6)),  # channels of no tokens
        ((4, 0), (1, WHOLE), (4, 1)),
    ],
)
def test_shapes_of_scales(shape, block, scales):
    x = np.ones(shape, np.float32)
    by = groupwise.parameters(x, block, "w", bits=4)
    assert by.scale.shape == by.zero_point.shape == scales
    codes = groupwise.quantize(x, by, "w")
    assert codes.shape == shape
    assert groupwise.dequantize(codes, by, "w").shape == shape


def test_per_channel_and_per_token_are_affines_own():
    x = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    by = groupwise.parameters(x, (1, WHOLE), "w")
    np.testing.assert_array_equal(by.scale, affine.per_channel_scale(x))
    np.testing.assert_array_equal(by.scale, affine.per_token_scale(x))
    np.testing.assert_array_equal(groupwise.quantize(x, by, "w"), affine.quantize(x, by.scale))


@pytest.mark.parametrize(
    ("x", "symmetric", "scale", "zero_point", "codes"),
    [
        ([7, -7, 0.5, 1.5], True, 1, 0, [7, -7, 0, 2]),  # absmax / 7; ties to even
        ([0, 0, 0, 0], True, 1, 0, [0, 0, 0, 0]),  # a group of zeros
        ([0, 0, 0, 0], False, 1, -8, [-8, -8, -8, -8]),
        ([0, 15, 7, 1], False, 1, -8, [-8, 7, -1, -7]),  # one-sided: all 16 codes
        ([-15, 0, -1, -8], False, 1, 7, [-8, 7, 6, -1]),
        ([-5, 10, 0, 1], False, 1, -3, [-8, 7, -3, -2]),  # zero is exact
        ([5, 15, 10, 6], False, 1, -8, [-3, 7, 2, -2]),  # the range is made to include 0
    ],
)
def test_four_bits_by_hand(x, symmetric, scale, zero_point, codes):
    x = np.array([x], np.float32)
    by = groupwise.parameters(x, (1, 4), "w", bits=4, symmetric=symmetric)
    assert (by.scale, by.zero_point) == (scale, zero_point)
    assert groupwise.quantize(x, by, "w").tolist() == [codes]


def test_four_bits_clip_at_both_ends():
    by = groupwise.Parameters(np.ones((1, 1), np.float32), np.zeros((1, 1), np.int8), 4)
    x = np.array([[-9, -8.5, -8, 7.5, 8, 1e30]], np.float32)
    assert groupwise.quantize(x, by, "w").tolist() == [[-8, -8, -8, 7, 7, 7]]


@settings(max_examples=30, deadline=None)
@given(zero_point=st.integers(-128, 127), code=st.integers(-128, 127))
def test_antiquant_offset_is_added(zero_point, code):
    zero = np.array([zero_point], np.int8)
    offset = groupwise.antiquant_offset(zero)
    assert offset.dtype == np.float32
    assert not np.signbit(offset[0]) or offset[0] < 0
    q = np.array([code], np.int8)
    assert affine.dequantize(q, 0.5, zero) == (np.float32(code) + offset) * np.float32(0.5)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ((1, 4), r"layer\.weight: groups of 4 do not divide K = 6, axis 1 of \(2, 6\)"),
        ((1, 0), "groups of 0 do not divide K = 6"),
        ((1, -2), "groups of -2 do not divide K = 6"),
        ((1, 12), "groups of 12 do not divide K = 6"),
        ((1,), r"a block of 1 axes, expected 2 for the shape \(2, 6\)"),
    ],
)
def test_refuses_blocks(block, message):
    with pytest.raises(MsQuantError, match=message):
        groupwise.parameters(np.ones((2, 6), np.float32), block, "layer.weight")


@pytest.mark.parametrize("shape", [(2, 4), (3, 1), (2,), (0, 1), (2, 0)])
def test_refuses_scales_that_do_not_divide(shape):
    by = groupwise.Parameters(np.ones(shape, np.float32), np.zeros(shape, np.int8))
    with pytest.raises(MsQuantError, match=r"w: scales of shape .* do not divide"):
        groupwise.dequantize(np.ones((2, 6), np.int8), by, "w")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])  # 1e300 is inf in float32
def test_refuses_what_is_not_finite(bad):
    x = np.array([[1.0, bad]])
    with pytest.raises(MsQuantError, match="w: 1 of 2 values are NaN or inf"):
        groupwise.parameters(x, (1, WHOLE), "w")
    by = groupwise.parameters(np.ones((1, 2)), (1, WHOLE), "w")
    with pytest.raises(MsQuantError, match="w: 1 of 2 values are NaN or inf"):
        groupwise.quantize(x, by, "w")
