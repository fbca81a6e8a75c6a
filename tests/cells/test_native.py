"""The native kernels as a Cell calls them: directly, under jit, in graph mode, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Tensor, nn, ops

from ms_quant import kernels
from ms_quant.cells import QuantLinear
from ms_quant.cells import native as under_mindspore
from ms_quant.kernels import native
from ms_quant.numerics.activation import Float, PerToken, Phased, static_activation
from ms_quant.numerics.grid import AffineFormat
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.storage import DTYPES

pytestmark = [
    pytest.mark.usefixtures("blocking_mindspore"),
    pytest.mark.skipif(not kernels.available(), reason="no C++ compiler at install time"),
]
INPUTS, OUTPUTS = 40, 24


def linear(kind: str) -> QuantizedLinear:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((OUTPUTS, INPUTS), np.float32)
    bounds = np.full(INPUTS, -3, "f4"), np.full(INPUTS, 2, "f4")
    static = static_activation(*bounds, None, DTYPES["float32"], "x")
    product = replace(static, folds_bias=True, multiplied_in=DTYPES["bfloat16"])
    activation = {
        "dynamic": PerToken(),
        "static": static,
        "multiplied": product,
        "float": Float(),
    }.get(kind)
    if activation is None:
        activation = Phased().restore(static)
    grid = AffineFormat(4 if kind == "float" else 8).fit(weight, "weight")
    bias = rng.standard_normal(OUTPUTS, np.float32)
    return QuantizedLinear(grid.round(weight), grid, bias, activation)


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((*shape, INPUTS), np.float32)


KINDS = ["dynamic", "static", "multiplied", "phased", "float"]


@pytest.fixture
def graph_mode() -> Iterator[None]:
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decode", [False, True])
def test_jit_is_bit_equal_to_a_direct_call(kind: str, decode: bool) -> None:
    cell, x = QuantLinear(linear(kind)), Tensor(tokens(2, 3))

    @ms.jit
    def compiled(value):
        return cell(value, decode)

    np.testing.assert_array_equal(compiled(x).asnumpy(), cell(x, decode).asnumpy())


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("kind", KINDS)
def test_graph_mode(kind: str) -> None:
    record = linear(kind)
    network = nn.SequentialCell(QuantLinear(record), nn.ReLU())
    found = network(Tensor(tokens(5))).asnumpy()
    expected = np.maximum(record.forward(tokens(5)), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 if kind == "float" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_of_a_tensor(kind: str) -> None:
    record, x = linear(kind), Tensor(tokens(4, 6))
    cell = QuantLinear(record)
    for part in (x[:, 2], x[1:3], x.swapaxes(0, 1)):
        expected = cell(Tensor(part.asnumpy().copy())).asnumpy()
        np.testing.assert_array_equal(cell(part).asnumpy(), expected)


def test_an_input_that_is_being_computed() -> None:
    left = Tensor(np.random.default_rng(0).standard_normal((400, 400), np.float32))
    cell = QuantLinear(linear("dynamic"))
    for _ in range(3):
        x = ops.matmul(ops.matmul(left, left), left)[:, :INPUTS]
        whole = ops.matmul(left, ops.matmul(left, x))
        found = cell(whole)
        expected = cell(Tensor(whole.asnumpy().copy()))
        np.testing.assert_array_equal(found.asnumpy(), expected.asnumpy())


@pytest.mark.parametrize("shape", [(2, INPUTS // 2), (INPUTS, 2)])
def test_an_input_of_another_width_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError):
        QuantLinear(linear("dynamic"))(Tensor(np.zeros(shape, np.float32)))


def test_the_input_stays_as_it_is() -> None:
    x = Tensor(tokens(3))
    y = QuantLinear(linear("dynamic"))(x)
    before = y.asnumpy().copy()
    np.testing.assert_array_equal(x.asnumpy(), tokens(3))
    QuantLinear(linear("dynamic"))(Tensor(2 * tokens(3)))
    np.testing.assert_array_equal(y.asnumpy(), before)


def test_hooks_are_told() -> None:
    cell, seen = QuantLinear(linear("dynamic")), []
    expected = cell(Tensor(tokens(3))).asnumpy()
    handle = cell.register_forward_hook(lambda cell, x, y: seen.append(y.shape))
    np.testing.assert_array_equal(cell(Tensor(tokens(3))).asnumpy(), expected)
    handle.remove()
    assert seen == [(3, OUTPUTS)]


def test_a_gradient_needs_mindspores_operators() -> None:
    x = Tensor(tokens(3))
    with pytest.raises(RuntimeError, match="bprop not defined"):
        ms.grad(lambda x: QuantLinear(linear("float"))(x).sum())(x).asnumpy()
    found = ms.grad(lambda x: QuantLinear(linear("float"), native=False)(x).sum())(x)
    expected = np.tile(linear("float").float_weight().sum(axis=0), (3, 1))
    np.testing.assert_allclose(found.asnumpy(), expected, rtol=1e-4, atol=1e-5)


def test_without_the_library_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "native kernels not built"
    monkeypatch.setattr(native, "_load", lambda: (None, reason))
    under_mindspore._warn_once.cache_clear()
    record = linear("dynamic")
    with pytest.warns(UserWarning, match=reason) as caught:
        cells = [QuantLinear(record) for _ in range(3)]
    assert len(caught) == 1
    for cell in cells:
        assert cell.native is None
        np.testing.assert_array_equal(cell(Tensor(tokens(3))).asnumpy(), record.forward(tokens(3)))


def test_no_more_threads_than_mindspore_has() -> None:
    assert 1 <= under_mindspore.threads() <= ms.get_context("runtime_num_threads")
