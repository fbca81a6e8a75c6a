"""Whatever changes a parameter of a QuantLinear, the next call computes with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from ms_quant import kernels
from ms_quant.cells import QuantLinear
from ms_quant.errors import MsQuantError
from ms_quant.kernels import native as native_kernels
from ms_quant.numerics.activation import ObservedRange, PerToken
from ms_quant.numerics.linear import Kronecker, LowRank, QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.numerics.timestep import Timestep, TimestepActivation
from ms_quant.schemes.table import SCHEMES, get_scheme
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig, kept_timesteps

pytestmark = pytest.mark.usefixtures("blocking_mindspore", "steps")
IN, OUT, ROWS = 128, 10, 5
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"group_size": 64} if name == "W4A16" else {}) for name in SCHEMES},
    "W8A16 asymmetric": ("W8A16", {"group_size": 32, "symmetric": False}),
    "W4A8_DYNAMIC grouped": ("W4A8_DYNAMIC", {"group_size": 32}),
    "W8A8_DYNAMIC smooth": ("W8A8_DYNAMIC", {}),
    "W8A8_DYNAMIC smooth bfloat16": ("W8A8_DYNAMIC", {}),
    "W4A4_DYNAMIC clipped": ("W4A4_DYNAMIC", {}),
}
COMPILED = [  # others ask NumPy or the timestep in each call
    *("W8A8", "W8A8S", "W8A8_DYNAMIC", "W8A8_PER_TENSOR", "W8A8_PER_CHANNEL", "W8A8_MIX"),
    *("W8A16", "W4A16", "W4A8_DYNAMIC", "W4A4_DYNAMIC", "W16A16S", "W8A16 asymmetric"),
    *("W8A8_DYNAMIC smooth", "W8A8_DYNAMIC smooth bfloat16", "W4A4_DYNAMIC clipped"),
]
NATIVE_COMPILED = [*COMPILED, "W4A8_DYNAMIC grouped"]


@pytest.fixture
def steps() -> Iterator[None]:
    with kept_timesteps():
        TimestepManager.set_timestep_idx(1)
        yield


@pytest.fixture
def graph_mode() -> Iterator[None]:
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


@cache
def linear(case: str, seed: int) -> QuantizedLinear:
    name, options = CASES[case]
    scheme, rng = get_scheme(name, **options), np.random.default_rng(seed)
    low, high = np.full(IN, -2 - seed, "f4"), np.full(IN, 3, "f4")
    weight, bias = rng.standard_normal((OUT, IN), np.float32), rng.standard_normal(OUT, np.float32)
    grid = scheme.weight.fit(weight, "w")
    if isinstance(scheme.activation, Timestep):
        activation: Any = TimestepActivation(
            np.float32([0.02, 0.03]) * (seed + 1), np.int8([-3, 4 + seed])
        )
    else:
        activation = scheme.activation.fit(ObservedRange(low, high, DTYPES["float32"], "x"), None)
    made = QuantizedLinear(grid.round(weight), grid, bias, activation)
    if "smooth" in case:
        dtype = DTYPES["bfloat16" if "bfloat16" in case else "float32"]
        smooth = np.exp(rng.standard_normal(IN)).astype("f4")
        return replace(made, smooth=smooth, input_dtype=dtype)
    if "clipped" in case:
        return replace(made, activation=PerToken(4, 0.6 + seed / 5))
    if "FLATQUANT" in case:
        left, right = (rng.standard_normal((n, n)).astype("f4") for n in (8, 16))
        return replace(made, kronecker=Kronecker(left, right), activation=PerToken(4, 0.9))
    if "SVD" in case:
        l1, l2 = rng.standard_normal((4, IN)), rng.standard_normal((OUT, 4))
        return replace(made, branch=LowRank(l1.astype("f4"), l2.astype("f4")))
    return made


def cell_of(case: str, seed: int, native: bool = True) -> QuantLinear:
    policy = TimestepPolicyConfig("static")
    return QuantLinear(linear(case, seed), timestep_policy=policy, native=native)


def tokens() -> Tensor:
    return Tensor(np.random.default_rng(7).standard_normal((ROWS, IN), np.float32))


def by_set_data(p: Parameter, value: Tensor) -> None:
    p.set_data(value)


def by_load(p: Parameter, value: Tensor) -> None:
    holder = nn.Cell()
    holder.insert_param_to_cell("x", p, check_name_contain_dot=False)
    held = Parameter(value, name=p.name)
    assert ms.load_param_into_net(holder, {p.name: held}, strict_load=True) == ([], [])


def by_slices(p: Parameter, value: Tensor) -> None:
    for row in range(p.shape[0]):
        p[row] = value[row]


def by_ellipsis(p: Parameter, value: Tensor) -> None:
    p[...] = value


def by_view(p: Parameter, value: Tensor) -> None:
    p.asnumpy()[...] = value.asnumpy()


def by_one_element(p: Parameter, value: Tensor) -> None:
    """Each element by a write of its own, as a search by hand does it."""
    array, new = p.asnumpy(), value.asnumpy()
    for index in np.ndindex(array.shape):
        array[index] = new[index]


ROUTES: dict[str, Callable[[Parameter, Tensor], Any]] = {
    "set_data": by_set_data,
    "load_param_into_net": by_load,
    "assign": lambda p, value: ops.assign(p, value),
    "assign_value": lambda p, value: p.assign_value(value),
    "copy_": lambda p, value: p.copy_(value),
    "slices": by_slices,
    "ellipsis": by_ellipsis,
    "asnumpy": by_view,
    "elements": by_one_element,
}


def change(cell: QuantLinear, case: str, seed: int, route: str) -> None:
    for name, array in cell_of(case, seed, native=False).parameters_dict().items():
        ROUTES[route](getattr(cell, name), Tensor(array.asnumpy().copy()))


def assert_follows(case: str, native: bool, call: Callable[[QuantLinear], Callable]) -> None:
    """Changes a Cell back and forth by each route; what calls it is made once."""
    x, cell = tokens(), cell_of(case, 0, native)
    expected = [call(cell_of(case, seed, native))(x).asnumpy().copy() for seed in (0, 1)]
    assert not np.array_equal(*expected)
    run, seed = call(cell), 0
    np.testing.assert_array_equal(run(x).asnumpy(), expected[0])
    for route in ROUTES:
        seed = 1 - seed
        change(cell, case, seed, route)
        np.testing.assert_array_equal(run(x).asnumpy(), expected[seed], route)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_every_route_is_followed(case: str, native: bool) -> None:
    assert_follows(case, native, lambda cell: cell)


def compiled(cell: QuantLinear) -> Callable[[Tensor], Tensor]:
    @ms.jit
    def run(x):
        return cell(x)

    return run


@pytest.mark.parametrize("case", NATIVE_COMPILED)
def test_every_route_is_followed_under_jit(case: str) -> None:
    if case not in COMPILED and not kernels.available():
        pytest.skip("no C++ compiler at install time")
    assert_follows(case, True, compiled)


@pytest.mark.parametrize("case", ["W8A8_PER_CHANNEL", "W8A8_DYNAMIC smooth", "W8A16 asymmetric"])
def test_every_route_is_followed_under_jit_without_kernels(case: str) -> None:
    assert_follows(case, False, compiled)


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("case", NATIVE_COMPILED)
def test_every_route_is_followed_in_graph_mode(case: str) -> None:
    if case not in COMPILED and not kernels.available():
        pytest.skip("no C++ compiler at install time")
    assert_follows(case, True, nn.SequentialCell)


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("case", ["W8A8", "W4A4_DYNAMIC clipped", "W16A16S", "W4A16"])
def test_every_route_is_followed_in_graph_mode_without_kernels(case: str) -> None:
    assert_follows(case, False, nn.SequentialCell)


@pytest.mark.parametrize("case", ["W8A8_MXFP8", "W8A8FP8_DYNAMIC", "W8A16", "W8A8"])
def test_every_route_is_followed_without_the_library(case: str, monkeypatch) -> None:
    monkeypatch.setattr(native_kernels, "_load", lambda: (None, "not built"))
    assert_follows(case, False, lambda cell: cell)


class Updating(nn.Cell):
    """Assigns to a parameter and calls the linear, in one graph."""

    def __init__(self, linear: nn.Cell):
        super().__init__()
        self.linear = linear

    def construct(self, x, weight):
        first = self.linear(x)
        ops.assign(self.linear.weight, weight)
        return first, self.linear(x)


@pytest.mark.parametrize("mode", ["pynative", "jit"])
def test_an_assignment_between_two_calls(mode: str) -> None:
    case, x = "W8A8_DYNAMIC", tokens()
    cell = cell_of(case, 0)
    new = Tensor(linear(case, 1).weight)
    twin = QuantLinear(replace(linear(case, 0), weight=linear(case, 1).weight))
    expected = cell(x).asnumpy().copy(), twin(x).asnumpy()
    network = Updating(cell)
    found = (ms.jit(network.construct) if mode == "jit" else network)(x, new)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.asnumpy(), other)


def test_one_code_of_a_large_weight_and_an_assignment_that_is_not_done_yet() -> None:
    rng = np.random.default_rng(0)
    scheme = get_scheme("W8A8_DYNAMIC")
    weight = rng.standard_normal((1024, 1024), np.float32)
    grid = scheme.weight.fit(weight, "w")
    record = QuantizedLinear(grid.round(weight), grid)
    cell, x = QuantLinear(record), Tensor(rng.standard_normal((1, 1024), np.float32))
    cell(x)
    cell.weight.asnumpy()[700, 3] ^= 1
    codes = record.weight.copy()
    codes[700, 3] ^= 1
    expected = replace(record, weight=codes).forward(x.asnumpy())
    np.testing.assert_array_equal(cell(x).asnumpy(), expected)
    for flip in range(3):  # what is computed first, or waits for it, takes a while
        new = np.roll(codes, flip + 1, 0)
        late = ops.matmul(Tensor(np.eye(1024, dtype="f4")), Tensor(new.astype("f4")))
        ops.assign(cell.weight, late.astype(ms.int8))
        expected = replace(record, weight=new).forward(x.asnumpy())
        np.testing.assert_array_equal(cell(x).asnumpy(), expected)


def test_what_would_not_be_seen_is_refused() -> None:
    cell = cell_of("W8A8", 0)
    other = Parameter(Tensor(linear("W8A8", 1).weight), name="other")
    refused = (
        "weight: replaced by Parameter, expected new values by set_data or load_param_into_net"
    )
    cell.weight.name = "weight"
    with pytest.raises(MsQuantError, match=refused):
        cell.weight = other
    with pytest.raises(MsQuantError, match=refused):
        cell.insert_param_to_cell("weight", other)
    with pytest.raises(MsQuantError, match="bias: replaced by NoneType"):
        cell.bias = None
    with pytest.raises(MsQuantError, match="bias: replaced by NoneType"):
        del cell.bias
    with pytest.raises(MsQuantError, match=r"weight: set to Float32 \[10, 128\], expected Int8"):
        cell.weight.assign_value(Tensor(np.zeros((OUT, IN), np.float32)))
    with pytest.raises(
        MsQuantError, match=r"weight: set to Int8 \[3, 128\], expected Int8 \[10, 128"
    ):
        cell.weight.set_data(Tensor(np.zeros((3, IN), np.int8)), slice_shape=True)
    with pytest.raises(MsQuantError, match=r"weight: set_dtype\(Float16\), expected Int8"):
        cell.weight.set_dtype(ms.float16)
    expected = cell_of("W8A8", 0)(tokens()).asnumpy()
    np.testing.assert_array_equal(cell(tokens()).asnumpy(), expected)
    cell.weight = Tensor(linear("W8A8", 1).weight)  # values, which MindSpore gives to what is there
    assert np.array_equal(cell.weight.asnumpy(), linear("W8A8", 1).weight)


@pytest.mark.skipif(not kernels.available(), reason="no C++ compiler at install time")
def test_values_that_kernels_do_not_compute_are_refused() -> None:
    cell = cell_of("W8A8", 0)
    cell.input_offset[3] = 9
    with pytest.raises(MsQuantError, match="input_offset differs between channels, expected the s"):
        cell(tokens())
    cell.input_offset[...] = 9
    cell(tokens())
    cell = cell_of("W4A16", 0)
    cell.weight[2, 3] = 8
    for _ in range(2):
        with pytest.raises(MsQuantError, match=r"a code of the weight is no int4, expected -8..7"):
            cell(tokens())
    cell.weight[2, 3] = -8
    cell(tokens())


@pytest.mark.parametrize("case", CASES)
def test_a_deep_copy_is_on_its_own(case: str) -> None:
    network, x = nn.SequentialCell(cell_of(case, 0)), tokens()
    names = list(network.parameters_dict())
    expected = [cell_of(case, seed)(x).asnumpy().copy() for seed in (0, 1)]
    np.testing.assert_array_equal(network(x).asnumpy(), expected[0])
    twin = copy.deepcopy(network)
    assert list(twin.parameters_dict()) == names
    np.testing.assert_array_equal(twin(x).asnumpy(), expected[0])
    change(network[0], case, 1, "set_data")
    np.testing.assert_array_equal(twin(x).asnumpy(), expected[0])
    np.testing.assert_array_equal(network(x).asnumpy(), expected[1])
    change(twin[0], case, 1, "asnumpy")
    np.testing.assert_array_equal(twin(x).asnumpy(), expected[1])
    del network
    np.testing.assert_array_equal(twin(x).asnumpy(), expected[1])


@pytest.mark.parametrize("case", ["W8A8", "W4A16", "W16A16S"])
@pytest.mark.parametrize("mode", ["pynative", "jit", "graph"])
def test_to_float_casts_inputs_alone(case: str, mode: str) -> None:
    x = tokens()
    expected = cell_of(case, 0)(x.astype(ms.float16))
    network = nn.SequentialCell(cell_of(case, 0)).to_float(ms.float16)
    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
    try:
        found = (ms.jit(network.construct) if mode == "jit" else network)(x)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    assert found.dtype == expected.dtype == ms.float16
    np.testing.assert_array_equal(found.asnumpy(), expected.asnumpy())


@pytest.mark.skipif(not kernels.available(), reason="no C++ compiler at install time")
def test_the_memory_is_given_back() -> None:
    def regions() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    cell_of("W8A8_DYNAMIC", 0)(tokens())
    before = regions()
    for _ in range(300):
        cell_of("W8A8_DYNAMIC", 0)(tokens())
    assert regions() < before + 100


@pytest.mark.parametrize("case", [case for case in CASES if case not in NATIVE_COMPILED])
def test_what_asks_numpy_is_refused_in_graphs(case: str) -> None:
    cell, refused = cell_of(case, 0), "QuantLinear: inputs of this scheme are quantized in NumPy"
    network = nn.SequentialCell(cell)
    expected = network(tokens()).asnumpy()
    with pytest.raises(RuntimeError, match=refused):
        ms.jit(network.construct)(tokens())
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        with pytest.raises(RuntimeError, match=refused):
            network(tokens())
        if cell.native is None:  # else kernels are called all the same
            with pytest.raises(RuntimeError, match=refused):
                cell(tokens())
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    np.testing.assert_array_equal(network(tokens()).asnumpy(), expected)
