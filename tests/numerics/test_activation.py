"""What a linear sees of its input, against loops over Python floats and float32 scalars."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ms_quant.numerics.activation import (
    DualMxTokens,
    Float,
    MxTokens,
    ObservedRange,
    PerToken,
    PerTokenFloat8,
    Phased,
    PhasedActivation,
    StaticActivation,
    StaticInt8,
    tensor_activation,
)
from ms_quant.numerics.storage import DTYPES

F32, BF16, F16 = DTYPES["float32"], DTYPES["bfloat16"], DTYPES["float16"]
E4M3 = ml_dtypes.float8_e4m3fn
E2M1 = ml_dtypes.float4_e2m1fn
RULES = {  # name: (type, exponent of its largest number, whether ties go away from zero)
    "mxfp8_cann0": (E4M3, 8, False),
    "mxfp4_cann0": (E2M1, 2, False),
    "mxfp4_cann0_round": (E2M1, 2, True),
}


def tokens(columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((6, columns)) * np.exp(3 * rng.standard_normal((6, 1)))
    x[1] = 0
    x[2, ::2] = 0
    return x.astype(np.float32)


def slow_float(x: float, dtype: type, away: bool) -> float:
    """The number of a small float type that x becomes, found among all there are."""
    count = 127 if dtype is E4M3 else 8  # 127 of E4M3 is NaN
    table = np.arange(count, dtype=np.uint8).view(dtype).astype(float).tolist()
    size = min(abs(x), table[-1])
    above = next(i for i, value in enumerate(table) if value >= size)
    below = max(above - 1, 0)
    low, high = size - table[below], table[above] - size  # exact: few bits each
    if low == high:
        chosen = above if away or above % 2 == 0 else below
    else:
        chosen = above if high < low else below
    return math.copysign(table[chosen], x)


def slow_integers(row: list[np.float32], bits: int, clip: float) -> list[np.float32]:
    largest = 2 ** (bits - 1) - 1
    absmax = np.float32(max(abs(value) for value in row) * np.float32(clip))
    scale = np.float32(absmax / np.float32(largest))
    scale = scale if scale >= np.finfo(np.float32).tiny else np.float32(1)
    codes = [min(largest, max(-largest - 1, round(float(value / scale)))) for value in row]
    return [np.float32(code) * scale for code in codes]


def slow_float8(row: list[np.float32]) -> list[np.float32]:
    absmax = max(np.float32(1e-12), *(abs(value) for value in row))
    scale = np.float32(absmax / np.float32(448))
    return [np.float32(slow_float(float(value / scale), E4M3, False)) * scale for value in row]


def slow_blocks(row: list[np.float32], rule: str) -> list[np.float32]:
    """Blocks of 32 with the exponent floor(log2(absmax)) - that of the largest number."""
    dtype, top, away = RULES[rule]
    seen: list[np.float32] = []
    for start in range(0, len(row), 32):
        block = row[start : start + 32]
        absmax = float(max(abs(value) for value in block))
        exponent = math.frexp(absmax)[1] - 1 - top if absmax else -127
        exponent = min(127, max(-127, exponent))
        for value in block:
            element = slow_float(math.ldexp(float(value), -exponent), dtype, away)
            seen.append(np.float32(math.ldexp(element, exponent)))
    return seen


def slow_dual(row: list[np.float32], rule: str, size: int) -> list[np.float32]:
    seen: list[np.float32] = []
    for start in range(0, len(row), size):
        block = row[start : start + size]
        scale = np.float32(max(abs(value) for value in block) / np.float32(6))
        scale = scale if scale >= np.finfo(np.float32).tiny else np.float32(1)
        inner = slow_blocks([np.float32(value / scale) for value in block], rule)
        seen += [np.float32(value * scale) for value in inner]
    return seen


def assert_rows(activation, x: np.ndarray, slow) -> None:
    found = activation.fake(x)
    assert found.dtype == np.float32
    for row, seen in zip(x, found, strict=True):
        np.testing.assert_array_equal(seen, np.array(slow(list(row)), np.float32))


@pytest.mark.parametrize("columns", [1, 5, 64])
@pytest.mark.parametrize("clip", [1.0, 0.9, 0.55])
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_per_token(bits, clip, columns):
    x = tokens(columns)
    assert_rows(PerToken(bits, clip), x, lambda row: slow_integers(row, bits, clip))
    codes, scale = PerToken(bits, clip).codes(x)
    assert codes.dtype == np.int8
    assert scale.shape == (6, 1)
    assert (scale[1] == 1).all() and not codes[1].any()
    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("columns", [1, 5, 64])
def test_float8_per_token(columns):
    assert_rows(PerTokenFloat8(), tokens(columns), slow_float8)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("rule", RULES)
def test_microscaling_tokens(rule, columns):
    assert_rows(MxTokens(rule), tokens(columns), lambda row: slow_blocks(row, rule))


@pytest.mark.parametrize("size", [32, 64, 512])
@pytest.mark.parametrize("columns", [1, 33, 100, 130])
def test_dual_scale_tokens(columns, size):
    slow = lambda row: slow_dual(row, "mxfp4_cann0", size)  # noqa: E731
    assert_rows(DualMxTokens("mxfp4_cann0", size), tokens(columns), slow)


ANY = hnp.arrays(np.float32, (1, 40), elements=st.floats(-(2.0**60), 2.0**60, width=32))


@given(x=ANY)
@settings(deadline=None, max_examples=40)
def test_any_floats(x):
    assert_rows(PerToken(8), x, lambda row: slow_integers(row, 8, 1))
    assert_rows(PerTokenFloat8(), x, slow_float8)
    assert_rows(MxTokens("mxfp8_cann0"), x, lambda row: slow_blocks(row, "mxfp8_cann0"))
    assert_rows(DualMxTokens("mxfp4_cann0"), x, lambda row: slow_dual(row, "mxfp4_cann0", 512))


def test_float_inputs_stay():
    x = tokens(9)
    assert Float().fake(x) is x


@pytest.mark.parametrize("offset", [-128, -3, 0, 127])
def test_static(offset):
    """The codes are those of the input scale of each channel; all have one step afterwards."""
    rng = np.random.default_rng(1)
    steps = np.exp(rng.standard_normal(16)).astype(np.float32)
    activation = StaticActivation(np.float32(0.37), offset, steps)
    x = (100 * tokens(16)).astype(np.float32)
    codes, seen = activation.codes(x), activation.fake(x)
    for t, k in np.ndindex(x.shape):
        sum_ = np.float32(np.float32(x[t, k] / steps[k]) + np.float32(offset))
        code = min(127, max(-128, round(float(sum_))))
        assert codes[t, k] == code
        assert seen[t, k] == np.float32(code - offset) * np.float32(0.37)
    np.testing.assert_array_equal(activation.smooth, steps / np.float32(0.37))


def seen_of(x: np.ndarray, dtype: np.dtype = BF16) -> ObservedRange:
    return ObservedRange(x.min(axis=0), x.max(axis=0), dtype, "a")


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("shift", [-9.0, -0.2, 0.0, 5.0])
def test_one_step_for_a_tensor(shift, dtype):
    """The step is the least stored one that spans the range, and what was seen does not clip."""
    x = (np.random.default_rng(2).standard_normal((20, 8)) + shift).astype(np.float32)
    found = tensor_activation(seen_of(x, dtype))
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    exact = np.float32((high - low) / 255)
    bits = np.uint32 if dtype == F32 else np.uint16
    below = (found.scale.astype(dtype).view(bits) - bits(1)).view(dtype)
    assert found.scale >= exact > below.astype(np.float64)
    assert found.scale.astype(dtype).astype(np.float32) == found.scale
    assert found.offset == min(127, max(-128, round(-128 - low / float(found.scale))))
    np.testing.assert_array_equal(found.input_scale, np.full(8, found.scale))
    assert found.folds_bias
    steps = x.astype(np.float64) / found.scale + found.offset
    half = 0.5 + 2.0**-14  # of the zero point's rounding; see test_affine.py
    assert steps.min() >= -128 - half and steps.max() <= 127 + half
    np.testing.assert_array_equal(found.smooth, np.ones(8, np.float32))


def test_formats_give_what_their_names_say():
    x = tokens(8) + 1
    seen = seen_of(x)
    smooth = np.float32([1, 2, 4, 8] * 2)
    channel = StaticInt8().fit(seen, smooth)
    assert not channel.folds_bias
    low, high = (x / smooth).min(), (x / smooth).max()
    np.testing.assert_allclose(channel.scale, (high - min(low, 0)) / 255, rtol=2.0**-22)
    np.testing.assert_allclose(channel.smooth, smooth, rtol=2.0**-7)  # stored as bfloat16
    tensor, phased = StaticInt8(False, folds_bias=True).fit(seen, None), Phased().fit(seen, None)
    assert tensor.folds_bias and isinstance(phased, PhasedActivation)
    assert phased.static.scale == tensor.scale and phased.static.offset == tensor.offset
    np.testing.assert_array_equal(phased.fake(x), PerToken(8).fake(x))  # of prefill
    assert StaticInt8().holds_smoothing
    assert not any(f.holds_smoothing for f in (StaticInt8(False), Phased(), PerToken(), Float()))


def test_static_formats_restore_what_was_stored():
    static = StaticActivation(np.float32(0.5), -7, np.full(4, 0.5, np.float32))
    assert not StaticInt8().restore(static).folds_bias
    assert StaticInt8(False, folds_bias=True).restore(static).folds_bias
    phased = Phased().restore(static)
    assert phased.static.folds_bias
    assert (phased.static.scale, phased.static.offset) == (0.5, -7)


@pytest.mark.parametrize(
    "format",
    [Float(), PerToken(4), PerTokenFloat8(), MxTokens("mxfp8_cann0"), DualMxTokens("mxfp4_cann0")],
    ids=str,
)
def test_dynamic_formats_are_their_own_parameters(format):
    assert format.dynamic and format.fit(None, None) is format
    static = StaticActivation(np.float32(1), 0, np.ones(2, np.float32))
    assert format.restore(static) is format


@pytest.mark.parametrize("shape", [(0, 64), (3, 64), (2, 3, 64), (64,), (2, 0, 64)])
@pytest.mark.parametrize(
    "format",
    [PerToken(8), PerToken(4, 0.8), PerTokenFloat8(), MxTokens("mxfp8_cann0")]
    + [DualMxTokens("mxfp4_cann0", 32), StaticActivation(np.float32(1), 3, np.ones(64, "f4"))],
    ids=lambda value: type(value).__name__,
)
def test_leading_axes_are_kept(format, shape):
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    found = format.fake(x)
    assert found.shape == shape
    flat = format.fake(x.reshape(-1, 64))
    np.testing.assert_array_equal(found.reshape(-1, 64), flat)
