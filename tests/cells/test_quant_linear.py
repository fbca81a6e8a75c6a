"""QuantLinear is bit-equal to its definition in NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Tensor

from ms_quant.cells import QuantLinear
from ms_quant.numerics.linear import (
    QuantizedLinear,
    StaticActivation,
    int8_linear,
    quantize_linear,
    static_activation,
)
from ms_quant.numerics.storage import DTYPES

pytestmark = pytest.mark.usefixtures("blocking_mindspore")
INNER = [1, 7, 384, 1024, 1025, 2500]  # up to 1,024 one float32 product, then chunks


def layer(inner: int, static: bool, bias: bool, outs: int = 6, seed: int = 0) -> QuantizedLinear:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((outs, inner)).astype("f4")
    weight[min(1, outs - 1)] = 0
    offsets = rng.standard_normal(outs).astype("f4") if bias else None
    activation = None
    if static:
        low, high = np.full(inner, -2, "f4"), np.full(inner, 3, "f4")
        smooth = np.exp(rng.standard_normal(inner)).astype("f4")
        activation = static_activation(low, high, smooth, DTYPES["bfloat16"], "x")
    return quantize_linear(weight, offsets, activation, DTYPES["bfloat16"])


def tokens(inner: int, shape=(4,), seed: int = 1) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((*shape, inner)).astype("f4")
    if x.size:
        x[..., -1, :] = 0 if x.ndim > 1 else x[..., -1, :]
    return x


def assert_equal(found: Tensor, expected: np.ndarray) -> None:
    array = found.asnumpy()
    assert array.dtype == expected.dtype
    assert array.shape == expected.shape
    worst = np.flatnonzero(array.ravel() != expected.ravel())[:1]
    assert np.array_equal(array, expected), (
        f"element {worst}: {array.ravel()[worst]} instead of {expected.ravel()[worst]}"
    )


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_equals_the_definition(inner, static, bias, native):
    linear = layer(inner, static, bias)
    cell = QuantLinear(linear, native=native)
    for shape in [(4,), (1,), (2, 3), (1, 2, 3)]:
        x = tokens(inner, shape)
        assert_equal(cell(Tensor(x)), linear.forward(x))
    big = tokens(inner) * np.float32(1e3)  # static codes clip at both ends
    assert_equal(cell(Tensor(big)), linear.forward(big))


@pytest.mark.parametrize(
    ("inner", "static", "bias"),
    [
        (7, True, True),
        (1024, True, False),
        (2500, True, True),
        (7, False, False),
        (2500, False, True),
    ],
)
def test_equals_the_definition_under_jit(inner, static, bias):
    linear = layer(inner, static, bias)
    x = tokens(inner, (2, 3))
    for native in (True, False):
        cell = QuantLinear(linear, native=native)

        @ms.jit
        def run(value, cell=cell):
            return cell(value)

        assert_equal(run(Tensor(x)), linear.forward(x))


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_zero_rows(static, shape):
    linear = layer(7, static, True)
    assert_equal(QuantLinear(linear)(Tensor(tokens(7, shape))), linear.forward(tokens(7, shape)))


@given(
    inner=st.integers(1, 70),
    outs=st.integers(1, 9),
    rows=st.integers(1, 5),
    static=st.booleans(),
    bias=st.booleans(),
    scale=st.floats(-30, 30),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=40)
def test_equals_the_definition_at_any_size(inner, outs, rows, static, bias, scale, seed):
    linear = layer(inner, static, bias, outs, seed)
    x = tokens(inner, (rows,), seed) * np.float32(10.0**scale)
    for native in (True, False):
        assert_equal(QuantLinear(linear, native=native)(Tensor(x)), linear.forward(x))


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("absmax", [1e-45, 2.7e-43, 1e-40, 1e-38, 1e-37, 1e-36, 1e35])
def test_rows_whose_scale_is_subnormal_or_huge(static, absmax):
    """A subnormal scale would be flushed to zero by some operators and not by others."""
    linear = layer(7, static, True)
    x = np.float32(absmax) * np.float32([[1, -1, 0.5, 0.25, 0, -0.125, 1], [0] * 7])
    for native in (True, False):
        assert_equal(QuantLinear(linear, native=native)(Tensor(x)), linear.forward(x))


def extreme(inner: int, code: int, weight: int, offset: int) -> QuantizedLinear:
    activation = StaticActivation(np.float32(1), offset, np.ones(inner, "f4"))
    codes = np.full((2, inner), weight, np.int8)
    codes[1, 0] += 1 if weight < 0 else -1  # an odd neighbour
    return int8_linear(codes, np.ones(2, "f4"), None, activation)


@pytest.mark.parametrize("inner", [1023, 1024, 1025, 2048, 2500])
def test_the_largest_sums_are_exact(inner):
    """All codes -128 or 127: sums reach 2**24 at K = 1,024, and quant_bias the same again.

    The definition sums in float64 and Python's integers agree; float32 holds every integer up to
    2**24, so a chunk of 1,024 is exact in any order of summation.
    """
    for code, weight, offset in itertools.product((-128, 127), (-128, 127), (-128, -1, 0, 127)):
        linear = extreme(inner, code, weight, offset)
        x = np.full((1, inner), code - offset, np.float32)  # its code is exactly ``code``
        totals = [
            sum((code - offset) * int(w) for w in row) for row in linear.weight.astype(int).tolist()
        ]
        expected = np.float32([totals])
        np.testing.assert_array_equal(linear.forward(x), expected)
        for native in (True, False):
            assert_equal(QuantLinear(linear, native=native)(Tensor(x)), expected)


def test_the_largest_products_without_an_offset():
    """Dynamic activations reach 127, weights -128: the largest chunk is 1,024 * 127 * 128."""
    for inner in (1024, 1025):
        weight = np.full((1, inner), -128, np.int8)
        linear = int8_linear(weight, np.ones(1, "f4"))
        x = np.full((1, inner), 127, np.float32)
        expected = np.float32([[-inner * 127 * 128]])
        np.testing.assert_array_equal(linear.forward(x), expected)
        for native in (True, False):
            assert_equal(QuantLinear(linear, native=native)(Tensor(x)), expected)


@pytest.mark.parametrize(
    ("x", "code"),
    [
        (0.5, 0),  # tie to even
        (1.5, 2),
        (2.5, 2),
        (-0.5, 0),
        (-1.5, -2),
        (126.5, 126),
        (127.5, 127),  # 128 clips
        (-128.5, -128),
        (-129.0, -128),
        (1e30, 127),
        (-1e30, -128),
    ],
)
def test_rounding_is_half_to_even_and_clips(x, code):
    activation = StaticActivation(np.float32(1), 0, np.ones(1, "f4"))
    linear = int8_linear(np.ones((1, 1), np.int8), np.ones(1, "f4"), None, activation)
    assert QuantLinear(linear)(Tensor(np.float32([[x]]))).asnumpy() == code


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_narrow_inputs_give_narrow_outputs(static, dtype):
    """Computed in float32, rounded once at the end."""
    linear = layer(33, static, True)
    x = Tensor(tokens(33)).astype(dtype)
    wide = x.astype(ms.float32).asnumpy()
    y = QuantLinear(linear)(x)
    assert y.dtype == dtype
    expected = Tensor(linear.forward(wide)).astype(dtype).astype(ms.float32).asnumpy()
    assert_equal(y.astype(ms.float32), expected)


def test_parameters_are_the_checkpoints_tensors():
    linear = layer(7, True, True)
    found = {p.name: p for p in QuantLinear(linear).get_parameters()}
    assert {name: p.dtype for name, p in found.items()} == {
        "weight": ms.int8,
        "input_scale": ms.float32,
        "input_offset": ms.int8,
        "deq_scale": ms.float32,
        "quant_bias": ms.int32,
        "bias": ms.float32,
    }
    assert found["input_scale"].shape == found["input_offset"].shape == (7,)
    assert (found["input_offset"].asnumpy() == linear.activation.offset).all()
    assert not any(p.requires_grad for p in found.values())
    dynamic = QuantLinear(layer(7, False, False))
    assert sorted(p.name for p in dynamic.get_parameters()) == ["weight", "weight_scale"]
    assert "dynamic input" in repr(dynamic)
    assert "static" in repr(QuantLinear(linear))
