"""Static parameters of each timestep, against loops over Python numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant.algorithms import get_algorithms
from ms_quant.errors import MsQuantError
from ms_quant.numerics.activation import ObservedRange, PerToken, StaticActivation
from ms_quant.numerics.linear import QuantizedLinear, from_arrays, int8_linear
from ms_quant.numerics.storage import DTYPES
from ms_quant.numerics.timestep import Timestep, TimestepActivation
from ms_quant.numerics.timestep_linear import timestep_tables
from ms_quant.schemes.table import get_scheme

SCHEME = get_scheme("W8A8_TIMESTEP")
BF16, F32 = DTYPES["bfloat16"], DTYPES["float32"]


def made(steps: int = 4, inner: int = 9, bias: bool = True, dtype=BF16, seed: int = 0):
    """Tokens (T, 5, in) with a range that drifts by step, and the linear."""
    rng = np.random.default_rng(seed)
    drift = 10.0 ** np.linspace(1, -1, steps)[:, None, None]
    x = (drift * (rng.standard_normal((steps, 5, inner)) + 0.4)).astype("f4")
    weight = rng.standard_normal((6, inner)).astype("f4") * 0.1
    grid = SCHEME.weight.fit(weight, "w", dtype)
    activation = SCHEME.activation.fit(
        ObservedRange(x.min(axis=1), x.max(axis=1), dtype, "a"), None
    )
    offsets = rng.standard_normal(6).astype("f4") if bias else None
    return x, QuantizedLinear(grid.round(weight), grid, offsets, activation)


def slow_parameters(x: np.ndarray, dtype: np.dtype) -> tuple[float, int]:
    """The least stored step of the range with 0 in it, and its zero point."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    exact = float(np.float32((high - low) / 255))
    near = np.array(exact).astype(dtype)
    if float(near) < exact:
        near = np.nextafter(near, np.array(np.inf, dtype))
    return float(near), min(127, max(-128, round(-128 - low / float(near))))


def slow_forward(linear: QuantizedLinear, x: np.ndarray, scale: float, offset: int) -> np.ndarray:
    """(qx @ W^T - offset * sum(W) + rint(bias / deq_scale)) * deq_scale, in Python integers."""
    y = np.zeros((len(x), len(linear.weight)), np.float32)
    for i, row in enumerate(x):
        steps = [float(np.float32(v / np.float32(scale)) + np.float32(offset)) for v in row]
        codes = [min(127, max(-128, round(step))) for step in steps]
        for n, weights in enumerate(linear.weight.tolist()):
            unit = np.float32(np.float32(scale) * linear.grid.arrays()["weight_scale"][n, 0])
            total = sum((a - offset) * b for a, b in zip(codes, weights, strict=True))
            if linear.bias is not None:
                total += round(float(linear.bias[n]) / float(unit))
            y[i, n] = np.float32(total) * unit
    return y


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inner", [1, 9, 70])
def test_every_static_step_is_the_formula_with_its_own_parameters(inner, bias, dtype):
    x, linear = made(inner=inner, bias=bias, dtype=dtype)
    assert linear.integer
    for t, tokens in enumerate(x):
        scale, offset = slow_parameters(tokens, dtype)
        assert (linear.activation.scale[t], linear.activation.offset[t]) == (scale, offset)
        expected = slow_forward(linear, tokens, scale, offset)
        np.testing.assert_array_equal(linear.forward(tokens, step=t), expected)
        other = 3 * x[(t + 1) % 4]  # clips, or uses few codes
        expected = slow_forward(linear, other, scale, offset)
        np.testing.assert_array_equal(linear.forward(other, step=t), expected)


@given(seed=st.integers(0, 2**20), steps=st.integers(1, 5), inner=st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_any_number_of_steps(seed, steps, inner):
    x, linear = made(steps, inner, seed=seed)
    for t, tokens in enumerate(x):
        expected = slow_forward(linear, tokens, *slow_parameters(tokens, BF16))
        np.testing.assert_array_equal(linear.forward(tokens, step=t), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_dynamic_steps_are_w8a8_dynamic(bias):
    x, linear = made(bias=bias)
    dynamic = replace(linear, activation=PerToken(8))
    for tokens in x:
        np.testing.assert_array_equal(linear.forward(tokens), dynamic.forward(tokens))
        np.testing.assert_array_equal(linear.activation.fake(tokens), PerToken(8).fake(tokens))


def test_tables_hold_what_every_step_computes_with():
    x, linear = made()
    deq_scale, quant_bias = timestep_tables(linear, "a")
    assert (deq_scale.dtype, deq_scale.shape) == (np.float32, (4, 6))
    assert (quant_bias.dtype, quant_bias.shape) == (np.int32, (4, 6))
    for t in range(4):
        scale, offset = linear.activation.scale[t], int(linear.activation.offset[t])
        codes = np.clip(np.rint(x[t] / scale + np.float32(offset)), -128, 127).astype(np.int64)
        total = codes @ linear.weight.T.astype(np.int64) + quant_bias[t]
        y = total.astype(np.float32) * deq_scale[t]
        np.testing.assert_array_equal(linear.forward(x[t], step=t), y)


def test_arrays_come_back():
    x, linear = made()
    arrays = linear.arrays()
    found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    assert found == {
        "weight": ("int8", (6, 9)),
        "weight_scale": ("float32", (6, 1)),
        "input_scale": ("float32", (4, 1)),
        "input_offset": ("int8", (4, 1)),
    }
    back = replace(from_arrays(SCHEME.weight, SCHEME.activation, arrays), bias=linear.bias)
    for t in (*range(4), None):
        np.testing.assert_array_equal(back.forward(x[0], step=t), linear.forward(x[0], step=t))


def test_one_step_from_static_parameters():
    static = StaticActivation(np.float32(0.5), -7, np.full(4, 0.5, np.float32))
    activation = Timestep().restore(static)
    assert activation.scale.tolist() == [0.5] and activation.offset.tolist() == [-7]
    assert not Timestep().holds_smoothing and not Timestep().dynamic


def test_steps_that_were_not_reached_have_no_parameters():
    x, linear = made()
    low, high = x.min(axis=1), x.max(axis=1)
    low[1], high[1] = np.inf, -np.inf
    activation = Timestep().fit(ObservedRange(low, high, BF16, "a"), None)
    assert activation.scale[1] == 0 and (activation.scale[[0, 2, 3]] > 0).all()
    linear = replace(linear, activation=activation)
    deq_scale, quant_bias = timestep_tables(linear, "a")
    assert not deq_scale[1].any() and not quant_bias[1].any()
    message = r"^linear: timestep 1 is static but calibration did not reach it, expected a dynamic"
    with pytest.raises(MsQuantError, match=message):
        linear.forward(x[1], step=1)
    linear.forward(x[1])


@pytest.mark.parametrize("step", [-1, 4, 9])
def test_a_step_that_there_is_not(step):
    x, linear = made()
    message = rf"^linear: timestep {step} is static, expected 0\.\.3 as there are parameters of 4 "
    with pytest.raises(MsQuantError, match=message):
        linear.forward(x[0], step=step)


def test_a_bias_that_does_not_fit_names_the_step():
    activation = TimestepActivation(np.float32([1, 1e-9]), np.zeros(2, np.int8))
    bias, ones = np.float32([100]), np.ones((1, 2), np.int8)
    linear = int8_linear(ones, np.float32([1]), bias, activation)
    with pytest.raises(MsQuantError, match=r"^a, timestep 1\.quant_bias: 1 of 1 values do not fit"):
        timestep_tables(linear, "a")


def test_the_step_means_nothing_to_other_linears():
    x, linear = made()
    linear = replace(linear, activation=PerToken(8))
    assert linear.at_step(3) is linear
    np.testing.assert_array_equal(linear.forward(x[0], step=77), linear.forward(x[0]))


@pytest.mark.parametrize("algorithm", ["histogram", "percentile"])
def test_one_range_for_all_steps_is_refused(algorithm):
    with pytest.raises(MsQuantError, match="its activations have a range for each timestep"):
        get_algorithms(algorithm, SCHEME)
