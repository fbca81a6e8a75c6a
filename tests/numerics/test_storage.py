"""``round_up`` against the list of every number of the type."""

from __future__ import annotations

import bisect

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant.errors import MsQuantError
from ms_quant.numerics.storage import (
    DTYPES,
    nearest,
    round_up,
    smallest_normal,
    weight_scale_dtype,
    widened,
)

NARROW = ["bfloat16", "float16"]


def positive_normals(name: str) -> list[float]:
    """Every positive normal number of a 16-bit type, from its definition."""
    exponent_bits, mantissa_bits = {"bfloat16": (8, 7), "float16": (5, 10)}[name]
    bias = 2 ** (exponent_bits - 1) - 1
    return [
        2.0 ** (exponent - bias) * (1 + mantissa / 2**mantissa_bits)
        for exponent in range(1, 2**exponent_bits - 1)
        for mantissa in range(2**mantissa_bits)
    ]


TABLE = {name: positive_normals(name) for name in NARROW}


@pytest.mark.parametrize("name", NARROW)
def test_every_number_of_the_type_is_itself(name):
    values = np.array(TABLE[name])
    found = round_up(values, DTYPES[name], "x")
    assert found.dtype == DTYPES[name]
    np.testing.assert_array_equal(found.astype(np.float64), values)


@pytest.mark.parametrize("name", NARROW)
def test_just_above_each_number_is_the_next_one(name):
    """2**-40 above, so that a step through float32 on the way would round it back."""
    values = np.array(TABLE[name])
    found = round_up(values[:-1] * (1 + 2.0**-40), DTYPES[name], "x")
    np.testing.assert_array_equal(found.astype(np.float64), values[1:])


@pytest.mark.parametrize("name", NARROW)
@given(data=st.data())
@settings(deadline=None)
def test_never_below_and_minimal(name, data):
    table = TABLE[name]
    values = data.draw(st.lists(st.floats(0, table[-1]), max_size=9))
    found = round_up(np.array(values, np.float64), DTYPES[name], "x")
    expected = [table[bisect.bisect_left(table, value)] for value in values]
    assert found.astype(np.float64).tolist() == expected


@given(value=st.floats(2.0**-126, float(np.finfo(np.float32).max)))
def test_float32_is_never_below_and_minimal(value):
    found = round_up(np.array([value]), DTYPES["float32"], "x")[0]
    assert float(found) >= value
    assert float(np.nextafter(found, np.float32(0))) < value


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("bfloat16", 1.0, 1.0),
        ("bfloat16", 1 + 2.0**-8, 1 + 2.0**-7),  # half a step: nearest-even would give 1
        ("bfloat16", 1 + 2.0**-30, 1 + 2.0**-7),
        ("bfloat16", 1.9999, 2.0),  # carries into the exponent
        ("float16", 1 + 2.0**-11, 1 + 2.0**-10),  # nearest-even would give 1
        ("float16", 1e-6, 2.0**-14),  # a subnormal is raised to the smallest normal
        ("float16", 0.0, 2.0**-14),
        ("bfloat16", 1e-40, 2.0**-126),
        ("float32", 1e-40, 2.0**-126),
        ("float16", 65504.0, 65504.0),  # the largest
        ("float32", 1 + 2.0**-30, 1 + 2.0**-23),
    ],
)
def test_table(name, value, stored):
    assert float(round_up(np.array([value]), DTYPES[name], "x")[0]) == stored


@pytest.mark.parametrize(
    ("name", "value"),
    [("float16", 65504.01), ("float16", 1e9), ("bfloat16", 3.4e38), ("float32", 3.5e38)],
)
def test_too_large_is_refused_by_name(name, value):
    with pytest.raises(MsQuantError, match=rf"^q\.input_scale: .* does not fit {name}"):
        round_up(np.array([1.0, value]), DTYPES[name], "q.input_scale")


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3), (1, 1, 1)])
def test_shape_is_kept(shape):
    assert round_up(np.ones(shape, np.float32), DTYPES["bfloat16"], "x").shape == shape


def test_smallest_normal():
    assert smallest_normal(np.dtype(ml_dtypes.bfloat16)) == 2.0**-126
    assert smallest_normal(np.dtype(np.float16)) == 2.0**-14
    assert smallest_normal(np.dtype(np.float32)) == 2.0**-126


@pytest.mark.parametrize(
    ("model", "stored"),
    [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "float32")],
)
def test_type_of_weight_scales(model, stored):
    assert weight_scale_dtype(DTYPES[model]) == DTYPES[stored]


def test_scales_that_are_widened_may_be_subnormal() -> None:
    """Only float16 has them where scales are: the type is equal, and rounds up as others do."""
    dtype = widened(DTYPES["float16"])
    assert dtype == np.float16 and widened(DTYPES["bfloat16"]) is DTYPES["bfloat16"]
    x = np.array([1e-12, 1e-5, 2.0**-20, 3e-4, 7.0])
    found = round_up(x, dtype, "x").astype(np.float64)
    assert (found >= x).all() and found[2] == x[2]
    for value, near in zip(x, found, strict=True):  # the next number below is too small
        assert np.float64(np.nextafter(np.float16(near), np.float16(0))) < value
    np.testing.assert_array_equal(
        round_up(x[:2], DTYPES["float16"], "x").astype(np.float64), [2.0**-14, 2.0**-14]
    )


def test_nearest_stays_within_the_type() -> None:
    x = np.array([1e-30, 1e9, 1.0])
    found = nearest(x, DTYPES["float16"])
    np.testing.assert_array_equal(found, np.float32([2.0**-14, 65504, 1]))
