"""The int8 linear against loops over Python integers and float32 scalars."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import usual

from ms_quant.errors import MsQuantError
from ms_quant.numerics.activation import (
    DualMxTokens,
    Float,
    ObservedRange,
    PerToken,
    PhasedActivation,
)
from ms_quant.numerics.float_grid import Float8Format
from ms_quant.numerics.grid import AffineFormat
from ms_quant.numerics.linear import (
    Kronecker,
    LowRank,
    QuantizedLinear,
    StaticActivation,
    from_arrays,
    int8_linear,
    quantize_linear,
    smooth_of,
    stable_smooth,
    static_activation,
)
from ms_quant.numerics.storage import DTYPES
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.storage import ScaleType
from ms_quant.schemes.table import SCHEMES

F32, BF16, F16 = DTYPES["float32"], DTYPES["bfloat16"], DTYPES["float16"]
ROUNDOFF = 2.0**-24
HALF_STEP = 0.5 + 2.0**-14  # see test_affine.py
INNER = [1, 2, 7, 33, 384]


def ranges(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.min(axis=0), x.max(axis=0)


def layer(inner: int, outs: int = 5, *, dtype=BF16, smooth=True, bias=True, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((6, inner)) * np.exp(rng.standard_normal(inner)) + 0.3).astype("f4")
    weight = rng.standard_normal((outs, inner)).astype("f4") * 0.1
    vector = np.exp(rng.standard_normal(inner)).astype("f4") if smooth else None
    activation = static_activation(*ranges(x), vector, dtype, "x")
    offsets = rng.standard_normal(outs).astype("f4") if bias else None
    return x, weight, offsets, quantize_linear(weight, offsets, activation, F32)


def slow_static(linear: QuantizedLinear, x: np.ndarray) -> np.ndarray:
    """The golden-stick formula, from the tensors a checkpoint holds and nothing else."""
    y = np.zeros((len(x), len(linear.weight)), np.float32)
    weight = linear.weight.tolist()
    assert isinstance(linear.activation, StaticActivation)
    offset = linear.activation.offset
    for t, row in enumerate(x):
        codes = []
        for value, step in zip(row, linear.activation.input_scale, strict=True):
            steps = np.float32(np.float32(value / step) + np.float32(offset))
            codes.append(min(127, max(-128, round(float(steps)))))  # Python rounds half to even
        for n, weights in enumerate(weight):
            total = sum(a * b for a, b in zip(codes, weights, strict=True))
            total += int(linear.quant_bias[n])
            assert -(2**31) <= total < 2**31
            y[t, n] = np.float32(total) * linear.deq_scale[n]
            if linear.bias is not None:
                y[t, n] = y[t, n] + linear.bias[n]
    return y


def slow_dynamic(linear: QuantizedLinear, x: np.ndarray) -> np.ndarray:
    y = np.zeros((len(x), len(linear.weight)), np.float32)
    for t, row in enumerate(x):
        absmax = max(abs(value) for value in row)
        scale = np.float32(absmax / np.float32(127)) if absmax > 0 else np.float32(1)
        codes = [min(127, max(-128, round(float(value / scale)))) for value in row]
        for n, weights in enumerate(linear.weight.tolist()):
            total = sum(a * b for a, b in zip(codes, weights, strict=True))
            y[t, n] = np.float32(total) * scale * linear.weight_scale[n]
            if linear.bias is not None:
                y[t, n] = y[t, n] + linear.bias[n]
    return y


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("bias", [True, False])
def test_static_forward_is_the_formula(inner, bias):
    x, _, _, linear = layer(inner, bias=bias)
    found = linear.forward(x)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, slow_static(linear, x))


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("bias", [True, False])
def test_dynamic_forward_is_the_formula(inner, bias):
    x, weight, offsets, _ = layer(inner, bias=bias)
    x[1] = 0  # a token of zeros
    linear = quantize_linear(weight, offsets, None, BF16)
    np.testing.assert_array_equal(linear.forward(x), slow_dynamic(linear, x))


@given(
    inner=st.integers(1, 60),
    outs=st.integers(1, 6),
    dtype=st.sampled_from([BF16, F16, F32]),
    smooth=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=50)
def test_static_output_error_is_bounded(inner, outs, dtype, smooth, seed):
    """Exact a = x / s and b = W s are each off by half a step, so the sum of products is off by
    sum(|a| e_b + |b| e_a + e_a e_b) at most; six float32 roundings on the way (smooth, W s,
    total, deq_scale, product, bias) are relative."""
    x, weight, bias, linear = layer(inner, outs, dtype=dtype, smooth=smooth, seed=seed)
    assert isinstance(linear.activation, StaticActivation)
    smooth_vector = linear.activation.input_scale.astype("f8") / float(linear.activation.scale)
    a, b = x / smooth_vector, weight * smooth_vector
    e_a = float(linear.activation.scale) * HALF_STEP
    e_b = linear.weight_scale[:, None].astype("f8") * HALF_STEP
    exact = x.astype("f8") @ weight.T.astype("f8") + bias
    magnitude = np.abs(a) @ np.abs(b).T + np.abs(bias)
    error = (
        np.abs(a).sum(axis=1)[:, None] * e_b.T + e_a * np.abs(b).sum(axis=1) + inner * e_a * e_b.T
    )
    bound = error + 6 * ROUNDOFF * (magnitude + error)
    assert (np.abs(linear.forward(x) - exact) <= bound).all()


@given(inner=st.integers(1, 60), outs=st.integers(1, 6), seed=st.integers(0, 2**20))
@settings(deadline=None, max_examples=50)
def test_dynamic_output_error_is_bounded(inner, outs, seed):
    x, weight, bias, _ = layer(inner, outs, seed=seed)
    linear = quantize_linear(weight, bias, None, BF16)
    e_a = np.abs(x).max(axis=1, keepdims=True).astype("f8") / 127 * HALF_STEP
    e_b = linear.weight_scale.astype("f8") * HALF_STEP
    a, b = np.abs(x).astype("f8"), np.abs(weight).astype("f8")
    error = a.sum(axis=1, keepdims=True) * e_b + e_a * b.sum(axis=1) + inner * e_a * e_b
    exact = x.astype("f8") @ weight.T.astype("f8") + bias
    bound = error + 6 * ROUNDOFF * (a @ b.T + np.abs(bias) + error)
    assert (np.abs(linear.forward(x) - exact) <= bound).all()


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("smooth", [True, False])
def test_stored_scale_is_exact_and_rounded_up(dtype, smooth):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((9, 50)).astype("f4") * 3
        vector = np.exp(rng.standard_normal(50)).astype("f4") if smooth else None
        activation = static_activation(*ranges(x), vector, dtype, "x")
        wanted = float(activation.scale) * (np.ones(50) if vector is None else vector.astype("f8"))
        stored = activation.input_scale
        np.testing.assert_array_equal(stored.astype(dtype).astype("f4"), stored)
        assert (stored >= wanted).all()
        spacing = 2.0**-7 if dtype == BF16 else 2.0**-10
        assert (stored < wanted * (1 + spacing)).all()
        np.testing.assert_allclose(activation.smooth, stored / activation.scale, rtol=2.0**-23)


@given(seed=st.integers(0, 2**20), shift=st.floats(-9, 9), dtype=st.sampled_from([BF16, F16, F32]))
@settings(deadline=None)
def test_no_calibrated_value_clips(seed, shift, dtype):
    """Calibrated values are within half a step of the range of codes."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((5, 12)) + shift).astype("f4")
    vector = np.exp(rng.standard_normal(12)).astype("f4")
    activation = static_activation(*ranges(x), vector, dtype, "x")
    assert -128 <= activation.offset <= 127
    steps = x.astype("f8") / activation.input_scale + activation.offset
    assert steps.min() >= -128 - HALF_STEP
    assert steps.max() <= 127 + HALF_STEP


def test_constant_positive_input_keeps_zero_and_clamps_the_offset():
    """Without 0 in the range the zero point would be -179, and +77 once wrapped to int8."""
    low, high = np.full(4, 0.5, "f4"), np.full(4, 3, "f4")
    activation = static_activation(low, high, None, F32, "x")
    assert activation.offset == -128
    assert activation.scale == np.float32(3 / 255)


def test_smoothing_is_taken_out_of_the_range():
    """Channel ranges 1, 8 and 2 divided by 1, 8 and 2 are all 1."""
    vector = np.float32([1, 8, 2])
    activation = static_activation(-vector, vector, vector, F32, "x")
    assert activation.scale == np.float32(2 / 255)
    np.testing.assert_array_equal(activation.input_scale, activation.scale * vector)


def test_small_float16_scales_are_raised_to_normal_numbers():
    low, high = np.float32([0, 0]), np.float32([1e-4, 1e-6])
    activation = static_activation(low, high, None, F16, "x")
    assert (activation.input_scale == 2.0**-14).all()
    x = np.float32([[1e-4, 1e-6]])
    linear = quantize_linear(np.float32([[1, 1]]), None, activation, F32)
    e_a = 2.0**-14 * HALF_STEP  # a step of x itself; what is smaller is lost, nothing blows up
    assert abs(linear.forward(x)[0, 0] - 1.01e-4) <= 2 * e_a * 1.01


def test_a_scale_beyond_float16_is_refused_by_name():
    huge = np.float32([3e38])
    with pytest.raises(MsQuantError, match=r"^model\.q_proj\.input_scale: .* does not fit float16"):
        static_activation(-huge, huge, None, F16, "model.q_proj")
    assert np.isfinite(static_activation(-huge, huge, None, BF16, "x").input_scale).all()


def test_all_zero_activations_and_subnormal_ones():
    for top in (0.0, 1e-42):
        activation = static_activation(np.zeros(3, "f4"), np.full(3, top, "f4"), None, BF16, "x")
        linear = quantize_linear(np.ones((2, 3), "f4"), np.float32([1, 2]), activation, F32)
        np.testing.assert_array_equal(linear.forward(np.zeros((1, 3), "f4")), [[1, 2]])


@pytest.mark.parametrize("inner", [1, 7, 1024, 4096])
@pytest.mark.parametrize("offset", [-128, -37, 0, 127])
def test_quant_bias_is_an_exact_integer(inner, offset):
    """Through bf16, as Golden Stick 1.4.1 computes it, it is off by up to hundreds."""
    rng = np.random.default_rng(inner)
    weight = rng.integers(-128, 128, (4, inner)).astype(np.int8)
    activation = StaticActivation(np.float32(0.1), offset, np.full(inner, 0.1, "f4"))
    linear = int8_linear(weight, np.full(4, 0.01, "f4"), None, activation)
    assert linear.quant_bias.dtype == np.int32
    assert linear.quant_bias.tolist() == [-offset * sum(row) for row in weight.tolist()]
    if inner == 4096 and offset == -37:
        rounded = linear.quant_bias.astype(ml_dtypes.bfloat16).astype(np.int64)
        assert (rounded != linear.quant_bias).any(), "the values no longer show the difference"


def test_zero_input_gives_the_bias_exactly():
    """A zero is the code of the zero point, so quant_bias cancels the sum."""
    x, _, bias, linear = layer(384)
    np.testing.assert_array_equal(linear.forward(np.zeros_like(x))[0], bias)


@pytest.mark.parametrize("static", [True, False])
def test_an_all_zero_row_gives_the_bias(static):
    x, weight, bias, linear = layer(33)
    weight[2] = 0
    activation = linear.activation if static else None
    linear = quantize_linear(weight, bias, activation, BF16)
    assert linear.weight_scale[2] == 1
    assert not linear.weight[2].any()
    np.testing.assert_array_equal(linear.forward(x)[:, 2], np.full(len(x), bias[2]))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_weight_scale_is_stored_exactly_and_never_clips(dtype):
    _, weight, _, _ = layer(50, 40)
    linear = quantize_linear(weight, None, None, dtype)
    scale = linear.weight_scale
    np.testing.assert_array_equal(scale.astype(dtype).astype("f4"), scale)
    absmax = np.abs(weight).max(axis=1)
    assert (scale.astype("f8") * 127 * (1 + 2 * ROUNDOFF) >= absmax).all()
    assert (np.abs(linear.weight.astype(int)).max(axis=1) <= 127).all()
    error = np.abs(linear.float_weight() - weight)
    assert (error <= scale[:, None] * HALF_STEP).all()


def test_float_weight_undoes_the_smoothing():
    _, weight, _, linear = layer(33)
    assert isinstance(linear.activation, StaticActivation)
    for n, k in np.ndindex(weight.shape):
        smooth = float(linear.activation.input_scale[k]) / float(linear.activation.scale)
        stands_for = int(linear.weight[n, k]) * float(linear.weight_scale[n]) / smooth
        assert linear.float_weight()[n, k] == pytest.approx(stands_for, rel=4 * ROUNDOFF)
        half_step = float(linear.weight_scale[n]) * HALF_STEP / smooth
        assert abs(stands_for - weight[n, k]) <= half_step * (1 + 2.0**-20)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (2, 0), (2, 3), ()])
def test_leading_axes_are_kept(static, shape):
    x, weight, bias, linear = layer(7)
    if not static:
        linear = quantize_linear(weight, bias, None, F32)
    rows = np.resize(x, (*shape, 7))
    found = linear.forward(rows)
    assert found.shape == (*shape, 5)
    flat = linear.forward(rows.reshape(-1, 7))
    np.testing.assert_array_equal(found.reshape(-1, 5), flat)


def test_clip_narrows_rows_apart():
    _, weight, _, _ = layer(33)
    ratios = np.float32([[1], [0.9], [0.8], [0.7], [0.55]])
    linear = quantize_linear(weight, None, None, F32, ratios)
    for n, ratio in enumerate(ratios[:, 0]):
        scale = np.float32(np.abs(weight[n]).max() * ratio) / np.float32(127)
        assert linear.weight_scale[n] == scale
        codes = [min(127, max(-128, round(float(value / scale)))) for value in weight[n]]
        assert linear.weight[n].tolist() == codes


INTEGER = {  # scheme: (bits of tokens, or None for static), by the docstring of forward
    "W8A8": None,
    "W8A8_PER_TENSOR": None,
    "W8A8_PER_CHANNEL": None,
    "W8A8S": None,
    "W8A8_DYNAMIC": 8,
    "W8A8_MIX": 8,
    "W8A8_TIMESTEP": 8,
    "W4A8_DYNAMIC": 8,
    "W4A4_DYNAMIC": 4,
    "W4A4_FLATQUANT_DYNAMIC": 4,
}
CHOICES = [
    *((name, {}) for name in SCHEMES),
    ("W8A16", {"group_size": 32}),
    ("W8A16", {"symmetric": False}),
    ("W4A16", {"group_size": 32, "symmetric": False}),
    ("W4A8_DYNAMIC", {"group_size": 64}),
    ("W4A4_MXFP4_DUALSCALE", {"dual_block_size": 64}),
]
VARIANTS = [pytest.param(*usual(name, **more), id=f"{name}{more or ''}") for name, more in CHOICES]


def made(
    scheme: Scheme,
    scales: ScaleType = ScaleType.FLOAT32,
    *,
    inner: int = 128,
    bias: bool = True,
    seed: int = 0,
):
    """Some inputs and a linear of a scheme, rounded to nearest."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((5, inner)) + 0.3).astype("f4")
    x[1] = 0
    weight = rng.standard_normal((6, inner)).astype("f4") * 0.1
    grid = scheme.weight.fit(weight, "w", scales.dtype(BF16))
    activation = scheme.activation.fit(ObservedRange(*ranges(x), BF16, "x"), None)
    offsets = rng.standard_normal(6).astype("f4") if bias else None
    return x, QuantizedLinear(grid.round(weight), grid, offsets, activation)


def slow_folded(linear: QuantizedLinear, x: np.ndarray) -> np.ndarray:
    """(qx @ W^T + quant_bias with the bias in it) * deq_scale, in Python integers."""
    static, y = linear.static, np.zeros((len(x), len(linear.weight)), np.float32)
    divides = static.multiplied_in is None
    factor = None if divides else (1 / static.scale).astype(static.multiplied_in).astype("f4")
    for t, row in enumerate(x):
        steps = row / static.scale if divides else row * factor
        steps = [float(step + np.float32(static.offset)) for step in steps]
        codes = [min(127, max(-128, round(step))) for step in steps]
        for n, weights in enumerate(linear.weight.tolist()):
            unit = np.float32(static.scale * linear.grid.scale[n, 0])
            total = sum((a - static.offset) * b for a, b in zip(codes, weights, strict=True))
            if linear.bias is not None:
                total += round(float(linear.bias[n]) / float(unit))
            y[t, n] = np.float32(total) * unit
    return y


def slow_tokens(linear: QuantizedLinear, x: np.ndarray, bits: int, clip: float = 1.0):
    """((qx @ W^T) * x_scale) * weight_scale + bias, in Python integers."""
    largest, y = 2 ** (bits - 1) - 1, np.zeros((len(x), len(linear.weight)), np.float32)
    for t, row in enumerate(x):
        absmax = np.float32(max(abs(value) for value in row) * np.float32(clip))
        scale = np.float32(absmax / np.float32(largest)) if absmax > 0 else np.float32(1)
        codes = [min(largest, max(-largest - 1, round(float(value / scale)))) for value in row]
        for n, weights in enumerate(linear.weight.tolist()):
            total = sum(a * b for a, b in zip(codes, weights, strict=True))
            y[t, n] = np.float32(total) * scale * linear.grid.scale[n, 0]
            if linear.bias is not None:
                y[t, n] += linear.bias[n]
    return y


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", INTEGER)
def test_integer_schemes_are_the_formula(name, bias):
    x, linear = made(*usual(name), bias=bias, inner=33)
    assert linear.integer
    if name == "W8A8":
        np.testing.assert_array_equal(linear.forward(x), slow_static(linear, x))
    elif INTEGER[name] is None:
        assert linear.static.folds_bias
        np.testing.assert_array_equal(linear.forward(x), slow_folded(linear, x))
    else:
        expected = slow_tokens(linear, x, INTEGER[name])
        np.testing.assert_array_equal(linear.forward(x), expected)
    phased = name == "W8A8_MIX"
    decoded = slow_folded(linear, x) if phased else linear.forward(x)
    np.testing.assert_array_equal(linear.forward(x, decode=True), decoded)


@pytest.mark.parametrize("clip", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("bits", [8, 4])
def test_clipped_tokens(bits, clip):
    x, linear = made(*usual("W4A4_DYNAMIC"), inner=33)
    linear = replace(linear, activation=PerToken(bits, clip))
    np.testing.assert_array_equal(linear.forward(x), slow_tokens(linear, x, bits, clip))


@pytest.mark.parametrize(("scheme", "scales"), [p for p in VARIANTS if p.id not in INTEGER])
def test_other_schemes_are_the_product_of_both_dequantized(scheme, scales):
    """K products and K - 1 sums in any order, and the bias: each off by 2**-24 of what it gives,
    so that the sum is off by (K + 1) * 2**-24 of the sum of magnitudes, and a little."""
    x, linear = made(scheme, scales)
    assert not linear.integer
    seen = linear.activation.fake(x).astype("f8")
    weight = linear.grid.values(linear.weight).astype("f8")
    bound = 130 * ROUNDOFF * (np.abs(seen) @ np.abs(weight).T + np.abs(linear.bias)) * 1.001
    found = linear.forward(x)
    assert found.dtype == np.float32
    for t, n in np.ndindex(found.shape):
        exact = sum(a * b for a, b in zip(seen[t], weight[n], strict=True)) + linear.bias[n]
        assert abs(found[t, n] - exact) <= bound[t, n]
    np.testing.assert_array_equal(linear.forward(x, decode=True), found)


def test_a_bias_is_not_lost_where_no_integer_sum_could_hold_it():
    x, linear = made(*usual("W8A8_PER_CHANNEL"), inner=64)
    weight = linear.float_weight()
    for format in (AffineFormat(8, 32), Float8Format()):
        grid = format.fit(weight, "w")
        other = replace(linear, weight=grid.round(weight), grid=grid)
        without = replace(other, bias=None).forward(x)
        np.testing.assert_array_equal(other.forward(x), without + linear.bias)


def power(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (2.0 ** rng.integers(-2, 3, shape)).astype("f4")


def exact_linear(fields: list[str], static: bool) -> tuple[np.ndarray, QuantizedLinear]:
    """Small integers times powers of two, so that float32 sums and products are all exact."""
    rng = np.random.default_rng(len(fields))
    codes = rng.integers(-7, 8, (5, 8)).astype(np.int8)
    activation = StaticActivation(np.float32(0.5), 3, 0.5 * power(rng, 8)) if static else Float()
    sylvester = np.float32([[1, 1], [1, -1]])
    right = np.kron(sylvester, np.float32([[1, 0], [2, 1]]))
    linear = QuantizedLinear(
        codes,
        AffineFormat(8).grid({"weight_scale": power(rng, 5, 1)}),
        rng.integers(-4, 5, 5).astype("f4"),
        activation,
        power(rng, 8) if "smooth" in fields else None,
        Kronecker(sylvester, right) if "kronecker" in fields else None,
        LowRank(power(rng, 2, 8), power(rng, 5, 2)) if "branch" in fields else None,
    )
    return rng.integers(-4, 5, (6, 8)).astype("f4"), linear


FIELDS = [[], ["smooth"], ["kronecker"], ["branch"], ["smooth", "kronecker", "branch"]]


def slow_effective(linear: QuantizedLinear) -> np.ndarray:
    """The matrix of what forward does to a float input, one unit vector after the other."""
    columns = []
    for unit in np.eye(8):
        x = unit if linear.smooth is None else unit / linear.smooth
        seen = x
        if linear.kronecker is not None:
            seen = seen @ np.kron(linear.kronecker.left, linear.kronecker.right)
        if isinstance(linear.activation, StaticActivation):
            seen = seen / linear.activation.smooth
        y = (linear.weight * linear.grid.scale.astype("f8")) @ seen
        if linear.branch is not None:
            y = y + linear.branch.l2.astype("f8") @ (linear.branch.l1 @ x)
        columns.append(y)
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_float_weight_undoes_every_transform(fields, static):
    x, linear = exact_linear(fields, static)
    found = linear.float_weight()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, slow_effective(linear))
    if not static:
        expected = x.astype("f8") @ found.T + linear.bias
        np.testing.assert_array_equal(linear.forward(x), expected)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_inputs_are_quantized_after_the_transforms(fields):
    """The branch reads the smoothed input as it is."""
    x, linear = exact_linear(fields, static=False)
    linear = replace(linear, activation=PerToken(4))
    smoothed = x if linear.smooth is None else x / linear.smooth
    seen = smoothed
    if linear.kronecker is not None:
        seen = (seen @ np.kron(linear.kronecker.left, linear.kronecker.right)).astype("f4")
    np.testing.assert_array_equal(linear.transformed(x), seen)
    plain = replace(linear, smooth=None, kronecker=None, branch=None, bias=None)
    expected = plain.forward(seen)
    if linear.branch is not None:
        expected = expected + smoothed @ linear.branch.weight.T
    expected = expected + linear.bias
    np.testing.assert_allclose(linear.forward(x), expected, rtol=4 * ROUNDOFF, atol=1e-5)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize(("scheme", "scales"), VARIANTS)
def test_arrays_give_the_linear_back(scheme, scales, fields):
    x, linear = made(scheme, scales, bias=False)
    rng = np.random.default_rng(3)
    if isinstance(linear.activation, PerToken):
        linear = replace(linear, activation=PerToken(linear.activation.bits, 0.75))
    more = {
        "smooth": power(rng, 128),
        "kronecker": Kronecker(np.eye(8, dtype="f4")[::-1], np.eye(16, dtype="f4")),
        "branch": LowRank(power(rng, 3, 128), power(rng, 6, 3)),
    }
    linear = replace(linear, **{name: more[name] for name in fields})
    arrays = linear.arrays()
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    again = from_arrays(scheme.weight, scheme.activation, arrays)
    assert type(again.activation) is type(linear.activation)
    for decode in (False, True):
        found, expected = again.forward(x, decode), linear.forward(x, decode)
        assert found.tobytes() == expected.tobytes()
    assert again.arrays().keys() == arrays.keys()
    for name, array in arrays.items():
        assert again.arrays()[name].tobytes() == array.tobytes(), name
    if isinstance(linear.activation, StaticActivation | PhasedActivation):
        assert again.static.folds_bias == linear.static.folds_bias


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_narrow_mul_scale_is_exact_and_read_again(name: str) -> None:
    dtype = DTYPES[name]
    rng = np.random.default_rng(0)
    smooth = stable_smooth(np.exp(4 * rng.standard_normal(5000)).astype("f4"), dtype)
    assert smooth.dtype == np.float32
    linear = QuantizedLinear(
        np.zeros((1, 5000), np.int8),
        AffineFormat().grid({"weight_scale": np.ones((1, 1), "f4")}),
        smooth=smooth,
        input_dtype=dtype,
    )
    factors = linear.mul_scale
    assert (factors.astype(dtype).astype("f4") == factors).all() and np.isfinite(factors).all()
    assert factors.min() >= ml_dtypes.finfo(dtype).smallest_normal
    np.testing.assert_array_equal(smooth_of(factors, dtype), smooth)
    end = np.array(np.inf, dtype).view(np.uint16)
    every = np.arange(1, end, dtype=np.uint16).view(dtype).astype("f4")  # all positive numbers
    limits = float(ml_dtypes.finfo(dtype).smallest_normal), 1e38  # 1 / x is a normal float32
    normal = every[(every >= limits[0]) & (every < limits[1])]
    again = replace(linear, smooth=smooth_of(normal, dtype)).mul_scale
    np.testing.assert_array_equal(again, normal)


def test_what_is_multiplied_and_divided_in_a_type_is_rounded_once() -> None:
    """A product of two numbers of a type is exact in float32; x that is none of it is not rounded
    first. A dual scale's product is not rounded."""
    x, smooth = np.float32([[1.0078125, 3, -5.03125, 1e-3]]), np.float32([0.75, 0.8, 1.2, 7])
    bf16 = DTYPES["bfloat16"]
    grid = AffineFormat().grid({"weight_scale": np.ones((1, 1), "f4")})
    linear = QuantizedLinear(np.ones((1, 4), np.int8), grid, smooth=smooth, input_dtype=bf16)
    product = x.astype("f8") * (1 / smooth.astype("f8")).astype(bf16).astype("f8")
    np.testing.assert_array_equal(
        linear.smoothed(x), product.astype("f4").astype(bf16).astype("f4")
    )
    dual = replace(linear, activation=DualMxTokens("mxfp4_cann0", 32))
    np.testing.assert_array_equal(dual.smoothed(x), product.astype("f4"))
    wide = replace(linear, input_dtype=DTYPES["float32"])
    np.testing.assert_array_equal(wide.smoothed(x), x * (1 / smooth.astype("f8")).astype("f4"))
