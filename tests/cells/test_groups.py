"""Linears of a network that read one input: one statistic, one smoothing vector, one search."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Tensor, nn

import ms_quant
from ms_quant.algorithms import get_algorithms
from ms_quant.algorithms.problem import Problem, apply
from ms_quant.cells import decoder
from ms_quant.cells.tree import get_cell, host_array
from ms_quant.errors import MsQuantError
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.config import parse_config
from ms_quant.numerics.linear import stable_smooth
from ms_quant.schemes.table import get_scheme
from ms_quant.statistics.search_windows import BlockErrors, SearchWindows

pytestmark = pytest.mark.usefixtures("blocking_mindspore")


def data(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).standard_normal(shape).astype("f4"))


def fill(network: nn.Cell, seed: int = 0) -> nn.Cell:
    rng = np.random.default_rng(seed)
    for parameter in network.get_parameters():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype("f4") * 0.3))
    return network


class Attention(nn.Cell):
    def __init__(self, size: int = 8):
        super().__init__()
        self.q, self.k, self.v = nn.Dense(size, size), nn.Dense(size, size), nn.Dense(size, size)
        self.out = nn.Dense(size, size)

    def construct(self, x, context=None):
        other = x if context is None else context
        q, k, v = self.q(x), self.k(other), self.v(other)
        weights = ms.ops.softmax(ms.ops.matmul(q, k.swapaxes(-1, -2)), -1)
        return x + self.out(ms.ops.matmul(weights, v))


class Net(nn.Cell):
    def __init__(self, depth: int = 2):
        super().__init__()
        self.first = nn.Dense(6, 8)
        self.blocks = nn.CellList([Attention() for _ in range(depth)])

    def construct(self, x, context=None):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, context)
        return x


def found(network: nn.Cell, *calls, **options) -> list[tuple[str, ...]]:
    return [group.paths for group in ms_quant.calibrate(network, list(calls), **options).groups]


SELF = [("first",)] + [
    group for i in range(2) for group in ([f"blocks.{i}.{n}" for n in "qkv"], [f"blocks.{i}.out"])
]
SELF = [tuple(group) for group in SELF]
CROSS = [("first",)] + [
    tuple(f"blocks.{i}.{n}" for n in names) for i in range(2) for names in (["q"], "kv", ["out"])
]


def test_linears_that_are_given_the_same_tensor_are_a_group_of_their_block():
    """The context of a cross-attention is one tensor for all blocks, and a group for each."""
    x, context = data(2, 5, 6), data(2, 7, 8, seed=1)
    assert found(fill(Net()), x) == SELF
    assert found(fill(Net()), (x, context)) == CROSS


def test_what_one_call_tells_apart_is_no_group():
    """The first call looks like self-attention; what was seen of q is not that of k."""
    x, context = data(2, 5, 6), data(2, 7, 8, seed=1)
    network = fill(Net())
    assert found(network, x, (x, context)) == CROSS
    observed = ms_quant.calibrate(network, [x, (x, context)])
    assert observed["blocks.0.q"].stats.tokens == 20
    assert observed["blocks.0.k"].stats.tokens == 10 + 14
    alone = ms_quant.calibrate(network, [x, (x, context)], groups=())
    for path in ("blocks.0.k", "blocks.0.v", "blocks.1.q"):
        np.testing.assert_array_equal(observed[path].stats.low, alone[path].stats.low)
        np.testing.assert_array_equal(observed[path].stats.rows, alone[path].stats.rows)


class Two(nn.Cell):
    """Two linears; ``change`` makes the second one's input of the first one's."""

    def __init__(self, change):
        super().__init__()
        self.a, self.b, self.change = nn.Dense(8, 8), nn.Dense(8, 8), change

    def construct(self, x):
        x = x * 2.0
        a = self.a(x)
        return self.b(self.change(x, a)) + 0 * a


@pytest.mark.parametrize(
    ("change", "together"),
    [
        (lambda x, a: x, True),
        (lambda x, a: x.reshape(-1, 8).reshape(x.shape), True),  # a view of the same memory
        (lambda x, a: x + 0.0, False),  # equal values, another tensor
        (lambda x, a: a, False),
        (lambda x, a: x.add_(1), False),  # the same memory, other values
    ],
)
def test_one_tensor_is_one_memory_with_the_values_that_it_had(change, together):
    assert found(fill(Two(change)), data(3, 8)) == ([("a", "b")] if together else [("a",), ("b",)])


def test_one_memory_in_rows_of_another_length_is_no_shared_input():
    class Rows(nn.Cell):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Dense(8, 4), nn.Dense(4, 4)

        def construct(self, x):
            x = x * 2.0
            return self.a(x).sum() + self.b(x.reshape(-1, 4)).sum()

    assert found(fill(Rows()), data(3, 8)) == [("a",), ("b",)]


def test_memory_that_is_used_again_is_no_shared_input():
    """In a chain each input is freed before the next one is made, often at its address."""
    chain = fill(nn.SequentialCell(*(nn.Dense(8, 8) for _ in range(12))))
    assert found(chain, data(4, 8)) == [(str(i),) for i in range(12)]


def test_a_group_is_found_when_it_is_first_reached():
    class Later(nn.Cell):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = nn.Dense(8, 8), nn.Dense(8, 8), nn.Dense(8, 8)

        def construct(self, x, more):
            y = self.first(x)
            return self.a(y) + self.b(y) if more else y

    calls = [(data(3, 8), False), (data(4, 8), True), (data(5, 8), True)]
    network = fill(Later())
    assert found(network, *calls) == [("first",), ("a", "b")]
    observed = ms_quant.calibrate(network, calls)
    assert observed["a"].stats.tokens == 9
    assert found(network, calls[0]) == [("first",), ("a",), ("b",)]


@pytest.mark.parametrize(
    "groups",
    [
        ["blocks.*.{q,k,v}"],
        ["re:blocks\\..\\.[qkv]$"],
        [["blocks.0.q", "blocks.0.k", "blocks.0.v"], "blocks.1.{q,k,v}"],
        lambda path, cell: path[:8] if path[-1] in "qkv" else None,
    ],
)
def test_groups_that_are_said(groups):
    x = data(2, 5, 6)
    assert found(fill(Net()), x, groups=groups) == SELF
    said = ms_quant.quantize(fill(Net()), calibration=[x], algorithm="smoothquant", groups=groups)
    itself = ms_quant.quantize(fill(Net()), calibration=[x], algorithm="smoothquant")
    for (name, a), (_, b) in zip(
        said.parameters_and_names(), itself.parameters_and_names(), strict=True
    ):
        np.testing.assert_array_equal(a.asnumpy(), b.asnumpy(), err_msg=name)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            ["blocks.*.{x,y}"],
            r"^groups\[0\]: 'blocks\.\*\.\{x,y\}' matches no linear, expected one",
        ),
        ([["first", "q"]], r"^groups\[0\]: 'q' is no linear that is quantized, expected one of: f"),
        (["*.q", "*.{q,k}"], r"^groups\[1\]: blocks\.0\.q is in two groups, expected one"),
        ([["first", "blocks.0.q"]], r"^groups: first reads 6 channels and blocks\.0\.q 8, expect"),
        ([3], r"^groups\[0\] is 3, expected a pattern or a list of paths"),
    ],
)
def test_groups_that_are_none(groups, message):
    with pytest.raises(MsQuantError, match=message):
        ms_quant.quantize(fill(Net()), calibration=[data(2, 5, 6)], groups=groups)


def test_a_group_has_one_smoothing_vector_of_all_its_weights():
    """s_j = max|x_j|^a / max|W_j|^(1-a), the maximum over q, k and v."""
    x, network = data(2, 5, 6), fill(Net(1))
    inputs = network.first(x).asnumpy().reshape(-1, 8)
    weights = np.concatenate([get_cell(network, f"blocks.0.{n}").weight.asnumpy() for n in "qkv"])
    network = ms_quant.quantize(
        network, "W8A8_DYNAMIC", calibration=[x], algorithm="smoothquant", alpha=0.5
    )
    expected = np.sqrt(np.abs(inputs).max(axis=0) / np.abs(weights).max(axis=0))
    scales = [get_cell(network, f"blocks.0.{n}").mul_scale.asnumpy() for n in "qkv"]
    np.testing.assert_allclose(scales[0], 1 / expected, rtol=1e-5)
    np.testing.assert_array_equal(scales[0], scales[1])
    np.testing.assert_array_equal(scales[0], scales[2])


def test_linears_of_a_group_that_become_something_else_are_solved_apart():
    def choose(path, cell):
        return None if path.endswith("k") else "W8A16" if path.endswith("q") else "W8A8"

    network, x = fill(Net(1)), data(2, 5, 6)
    network = ms_quant.quantize(network, choose, calibration=[x])
    schemes = {row.path: row.scheme for row in ms_quant.summary(network)}
    assert schemes == {
        "first": "W8A8",
        "blocks.0.q": "W8A16",
        "blocks.0.k": "FLOAT",
        "blocks.0.v": "W8A8",
        "blocks.0.out": "W8A8",
    }


# Searches by the error of a block


SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 16,
}
LENGTH = 19


class Decoder(nn.Cell):
    """One block as checkpoints have it, called as a network."""

    def __init__(self, block: BlockForward):
        super().__init__()
        self.layers = nn.CellList([decoder.DecoderBlock(block.config)])
        for name, parameter in self.layers[0].parameters_and_names():
            parameter.set_data(Tensor(block.arrays[name]))
        at = Positions(block.config, LENGTH)
        self.around = *map(Tensor, at.angles()), Tensor(at.mask)

    def construct(self, x):
        for layer in self.layers:
            x = layer(x, *self.around)
        return x


CONFIG = parse_config(SHAPE)


@pytest.fixture(scope="module")
def host() -> BlockForward:
    rng, shapes = np.random.default_rng(0), CONFIG.parameter_shapes()

    def random(name: str) -> np.ndarray:
        shape = shapes[name]
        spread = np.exp(rng.standard_normal(shape[-1]))  # channels of other sizes
        return (0.3 * rng.standard_normal(shape) * spread).astype("f4") + name.endswith(
            "norm.weight"
        )

    return BlockForward.load(CONFIG, 0, random)


@pytest.mark.parametrize("algorithm", ["osl", "awq"])
@pytest.mark.parametrize("group", CONFIG.block(0).groups, ids=lambda group: group.name)
def test_a_search_finds_what_it_finds_for_a_checkpoint(host, group, algorithm):
    """The same block as Cells and as the driver of checkpoints has it."""
    hidden = data(3, LENGTH, 24, seed=7).asnumpy()
    searched = SearchWindows(hidden.shape, 3, hidden.size)
    at = Positions(CONFIG, LENGTH)
    middle = host.branch(0, hidden, at)
    searched.add(0, hidden, middle, host.branch(1, middle, at))
    scheme = get_scheme("W8A8_DYNAMIC")
    errors = BlockErrors(host, at, group, searched)
    network = Decoder(host)
    calls = [Tensor(hidden[i : i + 1]) for i in range(3)]
    observed = ms_quant.calibrate(network, calls, algorithm=algorithm)
    paths = tuple(f"layers.0.{path}" for path in group.members)
    assert observed[paths[0]].paths == paths
    assert observed[paths[0]].block == "layers.0"
    problem = Problem(
        name=group.name,
        scheme=scheme,
        weights={path: host.arrays[f"{path}.weight"] for path in group.members},
        biases={},
        stats=observed[paths[0]].stats,
        dtype=np.dtype(np.float32),
        mse=errors.mse,
        relative_mse=errors.relative_mse,
        token_error=errors.token_error,
        scores=frozenset(path for path, linear in group.linears.items() if linear.scores),
    )
    chain = get_algorithms(algorithm, scheme)
    solution = chain.solve(problem)
    network = ms_quant.quantize(network, scheme.name, calibration=observed, algorithm=algorithm)
    expected = apply(problem, solution)
    for path in group.members:
        cell = get_cell(network, f"layers.0.{path}")
        if solution.smooth is not None:
            smooth = stable_smooth(solution.smooth)
            np.testing.assert_allclose(cell.mul_scale.asnumpy(), 1 / smooth, rtol=1e-6)
        np.testing.assert_array_equal(cell.weight.asnumpy(), expected[path].weight)


def test_without_blocks_the_outputs_of_the_group_count(host):
    """As in networks where no linears share an input."""
    calls = [data(1, LENGTH, 24, seed=seed) for seed in range(3)]

    def smoothed(**options) -> list[np.ndarray]:
        network = ms_quant.quantize(
            Decoder(host), "W8A8_DYNAMIC", calibration=calls, algorithm="osl", **options
        )
        cells = [cell for _, cell in network.cells_and_names()]
        return [c.mul_scale.asnumpy() for c in cells if getattr(c, "smooths", False)]

    whole, own = smoothed(), smoothed(blocks=())
    assert any(not np.array_equal(a, b) for a, b in zip(whole, own, strict=True))
    for a, b in zip(whole, smoothed(blocks=["layers.*"]), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(MsQuantError, match=r"^blocks: 'layer\.\*' matches no Cell that holds lin"):
        smoothed(blocks=["layer.*"])


def test_a_list_whose_linears_share_nothing_is_no_block():
    network = nn.SequentialCell(
        *(nn.SequentialCell(nn.Dense(8, 8), nn.ReLU(), nn.Dense(8, 8)) for _ in range(2))
    )
    observed = ms_quant.calibrate(fill(network), [data(4, 8)], algorithm="osl")
    assert [group.block for group in observed.groups] == [""] * 4
    assert not observed.windows


def test_blocks_of_a_loop_over_timesteps_are_called_in_their_step():
    """Of linears of timesteps the ones that a search tries ask for the step, too."""
    policy = ms_quant.TimestepPolicyConfig("static")

    def sampling():
        for step in range(3):
            ms_quant.TimestepManager.set_timestep_idx(step)
            yield data(2, 5, 6, seed=step) * (2.0**-step)

    network = ms_quant.quantize(
        fill(Net(1)),
        "W8A8_TIMESTEP",
        calibration=sampling(),
        algorithm="osl",
        timestep_policy=policy,
    )
    assert ms_quant.TimestepManager.get_timestep_idx() is None
    assert all(row.error < 1e-3 for row in ms_quant.summary(network))


@pytest.mark.parametrize("algorithm", ["minmax", "gptq", "clip+gptq", "ssz", "histogram"])
def test_groups_change_nothing_where_linears_are_solved_one_by_one(algorithm):
    calls = [data(2, 5, 6, seed=seed) for seed in range(2)]
    found = ms_quant.quantize(fill(Net(1)), calibration=calls, algorithm=algorithm)
    alone = ms_quant.quantize(fill(Net(1)), calibration=calls, algorithm=algorithm, groups=())
    for (name, a), (_, b) in zip(
        found.parameters_and_names(), alone.parameters_and_names(), strict=True
    ):
        np.testing.assert_array_equal(a.asnumpy(), b.asnumpy(), err_msg=name)


def test_a_bfloat16_network_is_searched_in_float32():
    """As one of float32 with the same values that is made to run in bfloat16."""
    narrow, wide = fill(Net(1)), fill(Net(1))
    for parameter, same in zip(narrow.get_parameters(), wide.get_parameters(), strict=True):
        parameter.set_dtype(ms.bfloat16)
        same.set_data(parameter.astype(ms.float32))
    calls = [data(2, 5, 6, seed=seed).astype(ms.bfloat16) for seed in range(2)]
    made = ms_quant.quantize(narrow, "W8A8", calibration=calls, algorithm="osl")
    calls = [x.astype(ms.float32) for x in calls]
    expected = ms_quant.quantize(wide, "W8A8", calibration=calls, algorithm="osl", dtype="bfloat16")
    for (name, a), (_, b) in zip(
        made.parameters_and_names(), expected.parameters_and_names(), strict=True
    ):
        np.testing.assert_array_equal(host_array(a), host_array(b), err_msg=name)
