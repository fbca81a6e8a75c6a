"""Scales whose rounded reciprocal is nearly exact, for runtimes that multiply by it."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.numerics.activation import ObservedRange, Phased, PhasedActivation, StaticInt8
from ms_quant.numerics.reciprocal import round_up_for_reciprocal, rounded_reciprocal
from ms_quant.numerics.storage import DTYPES

MANTISSA = {"bfloat16": 7, "float16": 10, "float32": 23}


def rounded(x: Fraction, dtype: str) -> Fraction:
    """To the nearest of a type's normal numbers, half to even."""
    exponent = 0
    while x >= 2:
        x, exponent = x / 2, exponent + 1
    while x < 1:
        x, exponent = x * 2, exponent - 1
    return round(x * 2 ** MANTISSA[dtype]) * Fraction(2) ** (exponent - MANTISSA[dtype])


def all_of_two_binades(dtype: str) -> list[float]:
    bits = MANTISSA[dtype]
    return [2.0**e * (1 + i / 2**bits) for e in (-6, 3) for i in range(2**bits)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reciprocals_are_rounded_once_to_the_type(dtype: str) -> None:
    scales = all_of_two_binades(dtype)
    found = rounded_reciprocal(np.float32(scales), DTYPES[dtype])
    assert [Fraction(float(r)) for r in found] == [
        rounded(1 / Fraction(scale), dtype) for scale in scales
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_runtime_rounds_a_scale_to_its_type_first(dtype: str) -> None:
    for scale in np.float32([0.0123, 3.14159, 0.7001, 1.0]):
        held = rounded(Fraction(float(scale)), dtype)
        found = Fraction(float(rounded_reciprocal(scale, DTYPES[dtype])))
        assert found == rounded(1 / held, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_scale_is_the_first_one_up_with_a_nearly_exact_reciprocal(dtype: str) -> None:
    """No activation clips, and 1 / scale is right to 0.1 %, for every scale there is."""
    near = 2.0**-10
    for scale in all_of_two_binades(dtype):
        for wanted in (scale, scale * (1 - 1e-5)):
            found = float(round_up_for_reciprocal(np.float64(wanted), DTYPES[dtype], "x"))
            assert wanted <= found <= 1.045 * wanted
            assert Fraction(found) == rounded(Fraction(found), dtype)  # exact in the type
            assert abs(found * rounded(1 / Fraction(found), dtype) - 1) <= near
            between, step = scale, 2.0 ** -MANTISSA[dtype]
            while between < found:  # the ones passed over are worse
                assert abs(between * rounded(1 / Fraction(between), dtype) - 1) > near
                between += step * 2.0 ** np.floor(np.log2(between))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_types_of_more_bits_keep_the_first(dtype: str) -> None:
    kind = DTYPES[dtype].type
    for scale in np.exp(np.random.default_rng(0).uniform(-8, 4, 200)):
        first = kind(scale)
        first = first if first >= scale else np.nextafter(first, kind(np.inf))
        assert round_up_for_reciprocal(scale, DTYPES[dtype], "x") == first


@pytest.mark.parametrize(("dtype", "scale"), [("float16", 1e-9), ("bfloat16", 1e-40)])
def test_tiny_scales_become_normal_ones(dtype: str, scale: float) -> None:
    found = round_up_for_reciprocal(np.float64(scale), DTYPES[dtype], "x")
    assert np.isfinite(rounded_reciprocal(found, DTYPES[dtype]))
    assert found >= np.finfo(np.float16 if dtype == "float16" else np.float32).tiny


def test_a_scale_beyond_the_type_is_refused() -> None:
    with pytest.raises(
        MsQuantError, match=r"x: 70000 does not fit float16, expected at most 65504"
    ):
        round_up_for_reciprocal(np.float64(70000), DTYPES["float16"], "x")
    largest = round_up_for_reciprocal(np.float64(65504), DTYPES["float16"], "x")
    assert largest == 65504  # there is no next one


def bfloat16(x: float) -> float:
    """Rounded half to even by integers."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    bits += 0x7FFF + (bits >> 16 & 1)
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("format", [StaticInt8(False, True, multiplies=True), Phased(True)])
def test_codes_are_those_of_a_product(format: StaticInt8 | Phased, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.float32(rng.normal(0.1, rng.uniform(0.1, 9), (50, 30)))
    seen = ObservedRange(x.min(axis=0), x.max(axis=0), DTYPES["bfloat16"], "x")
    found = format.fit(seen, None)
    static = found.static if isinstance(found, PhasedActivation) else found
    step = float(static.input_scale[0])
    assert (static.input_scale == step).all() and static.scale == np.float32(step)
    factor = np.float32(bfloat16(float(np.float32(1) / np.float32(step))))
    expected = [[round(float(v * factor + np.float32(static.offset))) for v in row] for row in x]
    np.testing.assert_array_equal(static.codes(x), np.clip(expected, -128, 127))
    assert np.abs(static.fake(x) - x).max() <= (0.5 + 255 * 2.0**-10) * step  # nothing clips
    dividing = StaticInt8(False, True).fit(seen, None)
    assert dividing.reciprocal is None
    assert dividing.scale <= static.scale <= 1.045 * dividing.scale
