"""Rows that are rounded as they are stored become what they do in float32."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant.files.float8_source import decode
from ms_quant.kernels import native, quantize_stored
from ms_quant.numerics.grid import AffineFormat
from ms_quant.numerics.storage import DTYPES

pytestmark = pytest.mark.skipif(not native.available(), reason="no native kernels")
ISAS = [isa for isa in native.ISAS if native.available() and native.has_isa(isa)]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NAN = 0x7F
SIZES = [0, 1, 7, 63, 64, 65, 128, 200]


def expected(wide: np.ndarray, bits: int, cleared: int) -> tuple[np.ndarray, np.ndarray]:
    grid = AffineFormat(bits).fit(wide, "w", DTYPES["bfloat16" if cleared else "float32"])
    return grid.round(wide), grid.scale


def check(stored: np.ndarray, wide: np.ndarray, isa: str, *rest: Any) -> None:
    scales, width, bits, cleared = rest
    codes = np.empty(stored.shape, np.int8)
    found = quantize_stored(stored, scales, width, codes, bits, cleared, isa, threads=2)
    assert found is not None
    for array, right in zip((codes, found), expected(wide, bits, cleared), strict=True):
        np.testing.assert_array_equal(array, right)


@pytest.mark.parametrize("isa", ISAS)
@given(
    rows=st.integers(0, 5),
    columns=st.sampled_from(SIZES[1:]),
    width=st.sampled_from([1, 3, 48, 64, 128, 300]),
    bits=st.sampled_from([4, 8]),
    cleared=st.sampled_from([0, 16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_float8_bit_for_bit(
    isa: str, rows: int, columns: int, width: int, bits: int, cleared: int, seed: int
) -> None:
    """Codes of every kind: zeros of both signs, the smallest, the largest; scales that make
    products below the smallest normal float32."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, columns)).astype(np.uint8)
    codes[codes & NAN == NAN] = 0x80
    exponents = rng.integers(-145, 100) + rng.integers(-3, 3, (rows, -(-columns // width)))
    scales = np.ldexp(rng.uniform(1, 2, exponents.shape), exponents).astype(np.float32)
    check(codes, decode(codes, scales, width), isa, scales, width, bits, cleared)


def test_every_code_of_float8() -> None:
    codes = np.array([[code for code in range(256) if code & NAN != NAN]], np.uint8)
    scales = np.full((1, 2), 127 / 448, np.float32)
    for isa in ISAS:
        check(codes, decode(codes, scales, 128), isa, scales, 128, 8, 0)


@pytest.mark.parametrize("isa", ISAS)
@given(
    rows=st.integers(0, 5),
    columns=st.sampled_from(SIZES),
    bits=st.sampled_from([4, 8]),
    cleared=st.sampled_from([0, 16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_bfloat16_bit_for_bit(
    isa: str, rows: int, columns: int, bits: int, cleared: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    size = np.float32(np.exp2(rng.integers(-130, 100)))
    x = (rng.standard_normal((rows, columns), np.float32) * size).astype(BFLOAT16)
    check(x, x.astype(np.float32), isa, None, 1, bits, cleared)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("place", [0, 66, 129])
def test_what_is_not_finite_is_said(isa: str, place: int) -> None:
    codes, scales = np.full((3, 130), 0x40, np.uint8), np.ones((3, 2), np.float32)
    out = np.empty(codes.shape, np.int8)
    for wrong in (0x7F, 0xFF):
        codes[1, place] = wrong
        assert quantize_stored(codes, scales, 128, out, isa=isa) is None
    codes[1, place], scales[1] = 0xFE, 1e36  # -448, times which float32 has no number
    assert quantize_stored(codes, scales, 128, out, isa=isa) is None
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        x = np.ones((3, 130), BFLOAT16)
        x[1, place] = value
        assert quantize_stored(x, None, 1, out, isa=isa) is None
