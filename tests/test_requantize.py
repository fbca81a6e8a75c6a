"""An int8 weight made again from its source: scales, codes, output error; in pieces and whole."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ms_quant.algorithms.clip import RATIOS
from ms_quant.numerics.linear import (
    QuantizedLinear,
    int8_linear,
    quantize_linear,
    static_activation,
)
from ms_quant.verify.requantize import Comparison, ScaleRule, compare, output_error

BF16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
WEIGHT = np.random.default_rng(0).standard_normal((30, 64), np.float32)
CLIP = np.resize(np.array(RATIOS, np.float32), (30, 1))


def pieces(weight: np.ndarray, size: int):
    return ((start, weight[start : start + size]) for start in range(0, len(weight), size))


def problems(linear: QuantizedLinear, rule: ScaleRule, size: int = 7) -> list[str]:
    comparison, _ = compare(linear, None, pieces(WEIGHT, size), rule)
    return list(comparison.problems("x", "weight_scale", WEIGHT.shape))


@pytest.mark.parametrize("dtype", [FLOAT32, BF16])
@pytest.mark.parametrize("clip", [1.0, CLIP], ids=["whole", "clipped"])
def test_what_quantize_linear_makes_is_found_again(dtype, clip):
    linear = quantize_linear(WEIGHT, None, None, dtype, clip)
    clipped = isinstance(clip, np.ndarray)
    scales, good = ScaleRule(clipped, dtype).find(WEIGHT, linear.weight_scale)
    assert good.all()
    np.testing.assert_array_equal(scales, linear.weight_scale)
    assert problems(linear, ScaleRule(clipped, dtype)) == []
    if clipped:  # three of the thirty rows have the factor 1
        _, good = ScaleRule(False, dtype).find(WEIGHT, linear.weight_scale)
        assert np.count_nonzero(good) == 3


def test_the_scale_behind_a_product_is_found():
    linear, factor = quantize_linear(WEIGHT, None, None, FLOAT32, CLIP), np.float32(0.0371)
    scales, good = ScaleRule(True, factor=factor).find(WEIGHT, factor * linear.weight_scale)
    assert good.all()
    np.testing.assert_array_equal(scales, linear.weight_scale)


def test_rows_of_zeros_have_scale_one():
    weight = np.zeros((2, 5), np.float32)
    _, good = ScaleRule(True).find(weight, np.array([1, 2], np.float32))
    assert good.tolist() == [True, False]


def test_scales_of_one_product_are_one_where_the_product_counts():
    weight, step = np.array([[1.0, -3.0], [2.0, 0.5]], np.float32), np.float32(0.013)
    scale = np.abs(weight).max(axis=1) / np.float32(127)
    near = np.nextafter(scale, np.float32(1))
    found = ScaleRule(False, step=step).find(weight, near)[1]
    assert found.tolist() == (step * near == step * scale).tolist()
    assert ScaleRule(False).find(weight, near)[1].tolist() == [False, False]
    assert ScaleRule(False, step=step).find(weight, 2 * scale)[1].tolist() == [False, False]
    coarse = np.float32(2.0**-140)  # by which all small scales become one
    assert ScaleRule(False, step=coarse).find(weight, near)[1].all()


@pytest.mark.parametrize("size", [1, 7, 30])
def test_each_difference_is_counted_and_the_first_named(size):
    linear = quantize_linear(WEIGHT, None, None, FLOAT32)
    linear.weight_scale[[9, 22]] *= 2
    linear.weight[4, 60] ^= 1
    linear.weight[29, 0] ^= 1
    scale = np.abs(WEIGHT[9]).max() / np.float32(127)
    code = int(linear.weight[4, 60])
    assert problems(linear, ScaleRule(False), size) == [
        f"x.weight_scale: 2 of 30 rows do not follow from the source; [9] is {2 * scale:.9g}, "
        f"expected {scale:.9g} or a clipping factor of it",
        "x.weight: 2 of 1920 values differ from those of the source; "
        f"[4, 60] is {code}, expected {code ^ 1}",
    ]


def test_pieces_give_the_error_of_the_whole():
    linear = quantize_linear(WEIGHT, None, None, FLOAT32)
    whole = output_error(linear, WEIGHT)
    _, error = compare(linear, None, pieces(WEIGHT, 7), ScaleRule(False))
    np.testing.assert_allclose(error, whole, rtol=1e-5)


def test_nothing_differs_in_no_rows():
    assert list(Comparison().problems("x", "deq_scale", (0, 4))) == []


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 3), (-3, 0), (-0.1, 3)])
def test_output_error_probes_the_range_the_linear_was_made_for(low: float, high: float) -> None:
    """One-sided inputs have an offset at an end of int8, where half of a centred probe clips."""
    weight = np.random.default_rng(0).standard_normal((32, 64), np.float32)
    ranges = np.full(64, low, np.float32), np.full(64, high, np.float32)
    activation = static_activation(*ranges, None, np.dtype(ml_dtypes.bfloat16), "x")
    linear = quantize_linear(weight, None, activation, np.dtype(np.float32))
    assert 0 < output_error(linear, weight) < 0.03
    wrong = int8_linear(linear.weight[::-1], linear.weight_scale, None, activation)
    assert output_error(wrong, weight) > 0.5
