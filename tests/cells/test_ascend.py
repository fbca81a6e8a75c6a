"""The Ascend path with doubles in place of MindSpore's operators; no device is needed.

The doubles check what MindSpore documents about each operator's arguments, and compute what it
documents, so that the whole path can be compared with the CPU path.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Tensor

from ms_quant.cells import QuantLinear
from ms_quant.numerics.linear import (
    QuantizedLinear,
    quantize_linear,
    stable_smooth,
    static_activation,
)
from ms_quant.numerics.storage import DTYPES

NARROW = [ms.float16, ms.bfloat16]
INNER, OUTS = 40, 6


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.astype(ms.float32).asnumpy()


def codes(steps: np.ndarray) -> Tensor:
    return Tensor(np.clip(np.rint(steps), -128, 127).astype(np.int8))


class Doubles:
    """In place of ``ascend.Operators``: records the calls and computes what is documented."""

    def __init__(self):
        self.calls = []

    def quant(self, x, scale, offset, sqrt_mode, rounding_mode, dst_type):
        """QuantV2: round(x * scale + offset); scale and offset have the type of x."""
        self.calls.append(("quant", x, scale, offset, sqrt_mode, rounding_mode, dst_type))
        return codes(wide(x) * wide(scale) + wide(offset))

    def dynamic_quant(self, x):
        """DynamicQuantExt: scale = max|x| / 127 of each row, float32, shape (rows,)."""
        self.calls.append(("dynamic_quant", x))
        scale = np.abs(wide(x)).max(axis=1) / np.float32(127)
        return codes(wide(x) / scale[:, None]), Tensor(scale.astype(np.float32))

    def matmul(self, dtype):
        """QuantBatchMatmul(transpose_x1=False, transpose_x2=True, dtype)."""

        def run(x1, x2, scale, offset, bias, per_token_scale):
            self.calls.append(("matmul", x1, x2, scale, offset, bias, per_token_scale, dtype))
            total = x1.asnumpy().astype(np.int64) @ x2.asnumpy().astype(np.int64).T
            if bias is not None:
                total = total + bias.asnumpy()
            y = total.astype(np.float32) * scale.asnumpy()
            if per_token_scale is not None:
                y = y * per_token_scale.asnumpy()[:, None]
            return Tensor(y).astype(dtype)

        return run


def layer(static: bool, bias: bool = True) -> QuantizedLinear:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((OUTS, INNER)).astype("f4")
    offsets = rng.standard_normal(OUTS).astype("f4") if bias else None
    activation = None
    if static:
        low, high = np.full(INNER, -2, "f4"), np.full(INNER, 3, "f4")
        smooth = np.exp(rng.standard_normal(INNER) / 2).astype("f4")
        activation = static_activation(low, high, smooth, DTYPES["bfloat16"], "x")
    return quantize_linear(weight, offsets, activation, DTYPES["bfloat16"])


def on_ascend(linear: QuantizedLinear) -> tuple[QuantLinear, Doubles]:
    cell = QuantLinear(linear, device_target="Ascend")  # the real operators can be made on a CPU
    cell.operators = Doubles()
    return cell, cell.operators


def tokens(dtype, *shape: int) -> Tensor:
    x = np.random.default_rng(1).standard_normal((*shape, INNER)).astype("f4")
    return Tensor(x).astype(dtype)


def test_the_operators_are_made_only_for_ascend():
    assert QuantLinear(layer(True), device_target="CPU").operators is None
    operators = QuantLinear(layer(True), device_target="Ascend").operators
    assert type(operators.quant).__name__ == "QuantV2"
    assert type(operators.dynamic_quant).__name__ == "DynamicQuantExt"


@pytest.mark.parametrize("dtype", NARROW)
def test_a_smoothing_vector_is_multiplied_in_the_type_of_inputs(dtype):
    narrow = DTYPES[str(dtype).lower()]
    smooth = stable_smooth(np.exp(np.random.default_rng(2).standard_normal(INNER)), narrow)
    linear = replace(layer(False), smooth=smooth, input_dtype=narrow)
    cell, doubles = on_ascend(linear)
    x = tokens(dtype, 5)
    y = cell(x)
    (_, given), _ = doubles.calls
    assert given.dtype == dtype
    np.testing.assert_array_equal(wide(given), linear.smoothed(wide(x)))
    expected = linear.forward(wide(x)).astype(narrow).astype("f4")
    np.testing.assert_allclose(wide(y), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", NARROW)
def test_the_matmul_takes_its_weight_as_out_in(dtype):
    operators = QuantLinear(layer(True), device_target="Ascend").operators
    matmul = operators.matmul(dtype)
    assert type(matmul).__name__ == "QuantBatchMatmul"
    assert matmul.transpose_x1 is False
    assert matmul.transpose_x2 is True
    assert operators.matmul(dtype) is matmul, "one operator for each type, made once"


@pytest.mark.parametrize("dtype", NARROW)
def test_static_arguments(dtype):
    linear = layer(True)
    cell, doubles = on_ascend(linear)
    x = tokens(dtype, 2, 3)
    y = cell(x)
    assert y.shape == (2, 3, OUTS)
    assert y.dtype == dtype
    (name, rows, scale, offset, *rest), matmul = doubles.calls
    assert name == "quant"
    assert rows.shape == (6, INNER)
    assert rows.dtype == scale.dtype == offset.dtype == dtype
    assert scale.shape == offset.shape == (INNER,)
    reciprocal = Tensor(np.float32(1) / linear.activation.input_scale).astype(dtype)
    np.testing.assert_array_equal(wide(scale), wide(reciprocal))
    assert (wide(offset) == linear.activation.offset).all()
    assert rest == [False, "ROUND", ms.int8]
    name, x1, x2, deq_scale, zero_points, bias, per_token, out_dtype = matmul
    assert name == "matmul"
    assert x1.dtype == x2.dtype == ms.int8
    assert x1.shape == (6, INNER)
    assert x2.shape == (OUTS, INNER)
    np.testing.assert_array_equal(x2.asnumpy(), linear.weight)
    assert deq_scale.dtype == ms.float32
    np.testing.assert_array_equal(deq_scale.asnumpy(), linear.deq_scale)
    assert bias.dtype == ms.int32
    np.testing.assert_array_equal(bias.asnumpy(), linear.quant_bias)
    assert zero_points is None
    assert per_token is None
    assert out_dtype == dtype


@pytest.mark.parametrize("dtype", NARROW)
def test_dynamic_arguments(dtype):
    linear = layer(False)
    cell, doubles = on_ascend(linear)
    y = cell(tokens(dtype, 5))
    assert y.shape == (5, OUTS)
    assert y.dtype == dtype
    (name, rows), matmul = doubles.calls
    assert name == "dynamic_quant"
    assert rows.dtype == dtype
    name, x1, x2, weight_scale, zero_points, bias, per_token, out_dtype = matmul
    assert name == "matmul"
    assert x1.dtype == x2.dtype == ms.int8
    assert x2.shape == (OUTS, INNER)
    assert weight_scale.dtype == ms.float32
    np.testing.assert_array_equal(weight_scale.asnumpy(), linear.weight_scale)
    assert zero_points is None
    assert bias is None
    assert per_token.dtype == ms.float32
    assert per_token.shape == (5,)
    assert out_dtype == dtype


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", NARROW)
def test_agrees_with_the_cpu_path(static, bias, dtype):
    """Equal up to what the narrow type costs.

    u is the type's relative rounding error. Static: the rounded reciprocal moves the steps of an
    input by u * |steps|, so its code by 1 + u * |steps| at most (1 where a tie is crossed), each
    worth deq_scale * |w|; float32 rounding is far below the 1. The dynamic path quantizes alike.
    The product is rounded to the type, the bias too, and their sum again.
    """
    u = 2.0**-11 if dtype == ms.float16 else 2.0**-8
    linear = layer(static, bias)
    cell, _ = on_ascend(linear)
    x = tokens(dtype, 7)
    found, expected = wide(cell(x)), linear.forward(wide(x))
    product = expected if linear.bias is None else expected - linear.bias
    bound = np.zeros_like(expected)
    if static:
        steps = np.abs(wide(x) / linear.activation.input_scale)
        moved = 1 + u * steps
        bound += (moved @ np.abs(linear.weight.astype("f4")).T) * linear.deq_scale
    offsets = 0 if linear.bias is None else np.abs(linear.bias)
    bound += 3 * u * (np.abs(product) + bound + offsets) * (1 + 4 * u)
    assert (np.abs(found - expected) <= bound).all()
    # The worst case above is loose, as if every code had moved the same way; typically few do.
    assert np.abs(found - expected).mean() < 0.05 * np.abs(expected).mean()


@pytest.mark.parametrize("static", [True, False])
def test_zero_rows_call_no_operator(static):
    cell, doubles = on_ascend(layer(static))
    y = cell(tokens(ms.float16, 2, 0))
    assert y.shape == (2, 0, OUTS)
    assert y.dtype == ms.float16
    assert doubles.calls == []


@pytest.mark.parametrize("static", [True, False])
def test_the_real_operators_are_not_registered_on_a_cpu(static):
    """So what these tests show is the calls, not the numbers of a device."""
    if ms.get_context("device_target") != "CPU":
        return
    cell = QuantLinear(layer(static), device_target="Ascend")
    with pytest.raises(RuntimeError, match="unregistered"):
        cell(tokens(ms.float16, 2)).asnumpy()
