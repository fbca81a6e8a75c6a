"""Swapping the linears of a network."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Tensor, mint, nn

import ms_quant
from ms_quant.cells import QuantLinear
from ms_quant.cells.sites import select
from ms_quant.cells.tree import get_cell, linears, replaced
from ms_quant.errors import MsQuantError
from ms_quant.numerics.linear import quantize_linear, static_activation
from ms_quant.numerics.storage import DTYPES

pytestmark = pytest.mark.usefixtures("blocking_mindspore")
F32 = DTYPES["float32"]


def data(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).standard_normal(shape).astype("f4"))


def fill(network: nn.Cell, seed: int = 0) -> nn.Cell:
    rng = np.random.default_rng(seed)
    for parameter in network.get_parameters():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype("f4") * 0.3))
    return network


class Block(nn.Cell):
    def __init__(self):
        super().__init__()
        self.up = nn.Dense(8, 12)
        self.down = mint.nn.Linear(12, 8, bias=False)

    def construct(self, x):
        return x + self.down(self.up(x))


class Net(nn.Cell):
    """Linears as an attribute, in a CellList, and in a SequentialCell in a SequentialCell."""

    def __init__(self):
        super().__init__()
        self.first = nn.Dense(6, 8)
        self.blocks = nn.CellList([Block(), Block()])
        self.tail = nn.SequentialCell(
            nn.SequentialCell(nn.Dense(8, 5), nn.ReLU()), mint.nn.Linear(5, 3)
        )

    def construct(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.tail(x)


PATHS = [
    "first",
    "blocks.0.up",
    "blocks.0.down",
    "blocks.1.up",
    "blocks.1.down",
    "tail.0.0",
    "tail.1",
]


def kinds(network: nn.Cell) -> dict[str, bool]:
    """Path to whether it is quantized now."""
    return {path: isinstance(get_cell(network, path), QuantLinear) for path in PATHS}


def test_finds_every_linear():
    assert [path for path, _ in linears(Net())] == PATHS


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC"])
def test_everything_is_swapped_under_its_full_name(scheme):
    network = fill(Net())
    before = network(data(20, 6)).asnumpy()
    assert ms_quant.quantize(network, scheme, calibration=[data(20, 6)]) is network
    assert all(kinds(network).values())
    suffixes = ["weight", "weight_scale"]
    if scheme == "W8A8":
        suffixes = ["weight", "input_scale", "input_offset", "deq_scale", "quant_bias"]
    biased = set(PATHS) - {"blocks.0.down", "blocks.1.down"}
    expected = {f"{path}.{suffix}" for path in PATHS for suffix in suffixes}
    expected |= {f"{path}.bias" for path in biased}
    assert {parameter.name for parameter in network.get_parameters()} == expected
    assert {name for name, _ in network.parameters_and_names()} == expected
    after = network(data(20, 6)).asnumpy()
    assert after.shape == before.shape
    assert not np.array_equal(after, before), "nothing was quantized"
    # Seven linears, each 1/127 off at most in relative terms of its largest value: a wrong
    # wiring is off by the size of the signal itself.
    assert np.abs(after - before).max() < 0.1 * np.abs(before).max()


def test_a_swapped_linear_is_the_reference_of_its_own_input():
    network = fill(nn.SequentialCell(nn.Dense(6, 4), nn.Dense(4, 3)))
    x = data(30, 6)
    weights = [cell.weight.asnumpy().copy() for cell in network]
    biases = [cell.bias.asnumpy().copy() for cell in network]
    inputs = [x.asnumpy(), network[0](x).asnumpy()]
    ms_quant.quantize(network, calibration=[x[:11], (x[11:],)])  # a Tensor, a tuple
    for cell, weight, bias, seen in zip(network, weights, biases, inputs, strict=True):
        activation = static_activation(seen.min(axis=0), seen.max(axis=0), None, F32, "x")
        linear = quantize_linear(weight, bias, activation, F32)
        np.testing.assert_array_equal(cell.weight.asnumpy(), linear.weight)
        np.testing.assert_allclose(cell.deq_scale.asnumpy(), linear.deq_scale, rtol=2.0**-20)
        assert (cell.input_offset.asnumpy() == activation.offset).all()
        probe = data(5, len(weight[0]), seed=9)
        y, expected = cell(probe).asnumpy(), linear.forward(probe.asnumpy())
        # The calibrated range may differ in the last bit, as Dense sums rows in another order.
        step = activation.scale * np.abs(weight).sum(axis=1)
        assert (np.abs(y - expected) <= step).all()


@pytest.mark.parametrize("algorithm", ["smoothquant", "osl"])
def test_algorithms_run_on_any_network(algorithm):
    network = fill(Net())
    before = network(data(20, 6)).asnumpy()
    ms_quant.quantize(network, "W8A8", calibration=[data(20, 6)], algorithm=algorithm)
    assert all(kinds(network).values())
    assert np.abs(network(data(20, 6)).asnumpy() - before).max() < 0.1 * np.abs(before).max()


def test_jit_of_a_swapped_network_equals_pynative():
    network = fill(Net())
    ms_quant.quantize(network, "W8A8", calibration=[data(20, 6)], exclude=["blocks.1.*"])
    x = data(4, 6, seed=3)
    eager = network(x).asnumpy()

    @ms.jit
    def run(value):
        return network(value)

    np.testing.assert_array_equal(run(x).asnumpy(), eager)


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        (["*"], [], PATHS),
        (["blocks.*"], [], PATHS[1:5]),
        (["*"], ["blocks.*.down", "first"], ["blocks.0.up", "blocks.1.up", "tail.0.0", "tail.1"]),
        (["blocks.0.*", "tail.1"], ["*.up"], ["blocks.0.down", "tail.1"]),
        (["first"], ["first"], []),
    ],
)
def test_include_and_exclude(include, exclude, chosen):
    network = fill(Net())
    ms_quant.quantize(network, "W8A8_DYNAMIC", include=include, exclude=exclude)
    assert [path for path, swapped in kinds(network).items() if swapped] == chosen


@pytest.mark.parametrize(
    "options",
    [{"include": ["block.*"]}, {"exclude": ["*.q_proj"]}, {"include": ["*", "First"]}],
)
def test_a_pattern_that_matches_nothing_is_an_error(options):
    network = fill(Net())
    with pytest.raises(MsQuantError, match=r"^pattern '.*' matches no linear, expected one of: fi"):
        ms_quant.quantize(network, "W8A8_DYNAMIC", **options)
    assert not any(kinds(network).values())


def test_select_keeps_definition_order():
    assert select(["c", "a", "b"], ["b", "c"], []) == ["c", "b"]


def test_a_cell_that_is_called_twice():
    class Twice(nn.Cell):
        def __init__(self):
            super().__init__()
            self.linear = nn.Dense(4, 4)

        def construct(self, x):
            return self.linear(self.linear(x) * 8.0)

    network = fill(Twice())
    x = data(9, 4)
    inner = network.linear(x).asnumpy() * 8
    low, high = (f([f(x.asnumpy()), f(inner)]) for f in (np.min, np.max))
    ms_quant.quantize(network, calibration=[x])
    scale = float((max(high, 0) - min(low, 0)) / 255)
    np.testing.assert_allclose(network.linear.input_scale.asnumpy(), scale, rtol=1e-6)


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC"])
def test_a_cell_at_two_places_is_swapped_at_both(scheme):
    class Shared(nn.Cell):
        def __init__(self):
            super().__init__()
            self.a = nn.Dense(4, 4)
            self.b = self.a
            self.more = nn.SequentialCell(nn.ReLU(), self.a)

        def construct(self, x):
            return self.more(self.b(x))

    network = fill(Shared())
    ms_quant.quantize(network, scheme, calibration=[data(9, 4)])
    assert isinstance(network.a, QuantLinear)
    assert network.b is network.a
    assert network.more[1] is network.a
    assert network.more.cell_list[1] is network.a
    assert all(parameter.name.startswith("a.") for parameter in network.get_parameters())


@pytest.mark.parametrize("make", [lambda: nn.Dense(6, 4), lambda: mint.nn.Linear(6, 4)])
def test_a_bare_linear_is_replaced_by_what_is_returned(make):
    linear = fill(make())
    quantized = ms_quant.quantize(linear, calibration=[data(9, 6)])
    assert isinstance(quantized, QuantLinear)
    assert {p.name for p in quantized.get_parameters()} >= {"weight", "bias", "deq_scale"}


def test_patterns_of_a_bare_linear_are_refused():
    with pytest.raises(MsQuantError, match=r"^Dense: is a linear itself, expected include and"):
        ms_quant.quantize(nn.Dense(6, 4), "W8A8_DYNAMIC", exclude=["*"])


def test_calibration_as_dataset_iterators_give_it():
    x = data(9, 6)
    expected = ms_quant.quantize(fill(Net()), calibration=[x])(x).asnumpy()
    for batch in ([x], {"x": x}, x.asnumpy(), (x.asnumpy(),), {"x": x.asnumpy()}):
        network = ms_quant.quantize(fill(Net()), calibration=[batch])
        assert np.array_equal(network(x).asnumpy(), expected)


@pytest.mark.parametrize("finite", [True, False])
def test_a_table_shared_with_the_head_keeps_its_name(finite):
    class Tied(nn.Cell):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.head = nn.Dense(4, 8, has_bias=False)
            self.head.weight = self.embed.embedding_table

        def construct(self, ids, factor):
            return self.head(self.embed(ids) * factor)

    network = fill(Tied())
    before = {path: parameter.name for path, parameter in network.parameters_and_names()}
    call = (Tensor([[1, 2]], ms.int32), Tensor(1.0 if finite else np.inf, ms.float32))
    if finite:
        ms_quant.quantize(network, calibration=[call])
        assert isinstance(network.head, QuantLinear)
    else:
        with pytest.raises(MsQuantError):
            ms_quant.quantize(network, calibration=[call])
        assert {p: q.name for p, q in network.parameters_and_names()} == before
    assert network.embed.embedding_table.name == before["embed.embedding_table"]
    names = [parameter.name for parameter in network.get_parameters()]
    assert len(set(names)) == len(names)


def test_calibration_is_needed_by_static_schemes_only():
    network = fill(Net())
    with pytest.raises(MsQuantError, match=r"^scheme W8A8: needs calibration inputs, found None$"):
        ms_quant.quantize(network, "W8A8")
    assert not any(kinds(network).values())
    ms_quant.quantize(network, "W8A8_DYNAMIC")


@pytest.mark.parametrize("calibration", [[], [data(0, 6)]])
def test_empty_calibration_is_refused(calibration):
    network = fill(Net())
    with pytest.raises(MsQuantError, match=r"^first: no calibration input reached it"):
        ms_quant.quantize(network, "W8A8", calibration=calibration)
    assert not any(kinds(network).values())


def test_a_linear_that_is_never_reached_is_refused_by_name():
    class Unused(nn.Cell):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Dense(4, 4), nn.Dense(4, 4)

        def construct(self, x):
            return self.used(x)

    network = fill(Unused())
    with pytest.raises(MsQuantError, match=r"^idle: no calibration input reached it; exclude it"):
        ms_quant.quantize(network, calibration=[data(5, 4)])
    assert type(network.used) is nn.Dense, "a refused network is left as it was"
    assert {p.name for p in network.get_parameters()} == {
        f"{path}.{name}" for path in ("used", "idle") for name in ("weight", "bias")
    }
    ms_quant.quantize(network, calibration=[data(5, 4)], exclude=["idle"])
    assert isinstance(network.used, QuantLinear)


def test_dense_with_an_activation_is_refused_by_path_before_anything_is_swapped():
    network = fill(nn.SequentialCell(nn.Dense(4, 4), nn.Dense(4, 4, activation="relu")))

    def never():
        raise AssertionError("calibration started before the network was checked")
        yield

    with pytest.raises(MsQuantError, match=r"^1: a Dense with a built-in activation"):
        ms_quant.quantize(network, calibration=never())
    assert type(network[0]) is nn.Dense
    ms_quant.quantize(network, "W8A8_DYNAMIC", exclude=["1"])
    assert isinstance(network[0], QuantLinear)


@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_parameters_are_refused_by_name(which, bad):
    network = fill(Net())
    parameter = getattr(network.blocks[1].up, which)
    values = parameter.asnumpy().copy()
    values.flat[3] = bad
    parameter.set_data(Tensor(values))
    with pytest.raises(MsQuantError, match=rf"^blocks\.1\.up\.{which}: 1 of \d+ values are NaN"):
        ms_quant.quantize(network, "W8A8_DYNAMIC")
    assert not any(kinds(network).values())


def test_bad_activations_are_refused_by_name_and_the_network_is_left_as_it_was():
    network = fill(Net())
    x = data(5, 6).asnumpy()
    x[2, 2] = np.inf
    with pytest.raises(MsQuantError, match=r"^first input: 1 of 30 values are NaN or inf"):
        ms_quant.quantize(network, calibration=[Tensor(x)])
    assert sum(isinstance(cell, nn.Dense | mint.nn.Linear) for _, cell in linears(network)) == 7
    assert network(data(5, 6)).shape == (5, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "W4"}, "^scheme 'W4' is unknown"),
        ({"algorithm": "magic"}, "^algorithm 'magic' is unknown"),
        ({"scheme": "W8A16", "algorithm": "osl"}, "^algorithm 'osl' does not work with"),
        ({"algorithm": "smoothquant", "alpha": 30}, r"^smoothquant\.alpha is 30: .* equal to 1"),
        ({"alpha": 0.5}, "^algorithm minmax takes no option 'alpha', expected none"),
        ({"algorithm": "quarot"}, "^algorithm 'quarot': quarot rotates a whole decoder"),
        ({"scheme": "W4A16", "group_size": 4}, "^group_size is 4, expected one of 0, 32, 64"),
        ({"scheme": "W4A16", "group_size": 32}, "^first.weight: groups of 32 do not divide K = 6"),
    ],
)
def test_unknown_names(options, message):
    with pytest.raises(MsQuantError, match=message):
        ms_quant.quantize(fill(Net()), calibration=[data(5, 6)], **options)


def test_a_network_without_linears_is_refused():
    with pytest.raises(MsQuantError, match=r"holds no Dense or Linear"):
        ms_quant.quantize(nn.SequentialCell(nn.ReLU()), "W8A8_DYNAMIC")


def test_replaced_puts_the_old_cells_back_after_an_error():
    network = Net()
    old = {path: get_cell(network, path) for path in ("first", "tail.0.0", "blocks.1.up")}
    names = [parameter.name for parameter in network.get_parameters()]
    with (
        pytest.raises(KeyError),
        replaced(network, {path: nn.Dense(1, 1) for path in old}),
    ):
        assert all(get_cell(network, path) is not cell for path, cell in old.items())
        raise KeyError
    assert all(get_cell(network, path) is cell for path, cell in old.items())
    assert network.tail[0].cell_list[0] is old["tail.0.0"]
    assert [parameter.name for parameter in network.get_parameters()] == names


def test_token_ids_as_calibration_keep_a_bounded_number_of_rows():
    """(batch, length) integers are batch * length tokens, not batch of them."""
    network = nn.SequentialCell(nn.Embedding(16, 4), nn.Dense(4, 4))
    ids = Tensor(np.arange(3 * 1024).reshape(3, 1024) % 16, ms.int32)
    stats = ms_quant.calibrate(network, [ids])["1"].stats
    assert stats.tokens == 3072
    assert len(stats.rows) == 512
