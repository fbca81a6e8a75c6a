"""What calibration has seen of a network: merged over parts of the data, written and read."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Tensor, nn

import ms_quant
from ms_quant.cells.blocks import chosen_calls
from ms_quant.cells.observations import Observations
from ms_quant.cells.observations_file import KEY
from ms_quant.errors import BadArgumentError, BadFileError, UnsupportedError
from ms_quant.files.safetensors_file import open_file
from ms_quant.files.writer import TensorPlan, write_file
from ms_quant.statistics.stats_file import stats_arrays, stats_facts

pytestmark = pytest.mark.usefixtures("blocking_mindspore")

ALL = "histogram+osl+gptq"


class Attention(nn.Cell):
    def __init__(self, size: int, names: str | list[str] = "qkv"):
        super().__init__()
        self.names = list(names)
        for name in [*self.names, "out"]:
            setattr(self, name, nn.Dense(size, size))

    def construct(self, x, context=None, factor=1.0, mask=None):
        other = x if context is None else context
        q, k, v = (
            getattr(self, name)(of) for name, of in zip(self.names, (x, other, other), strict=True)
        )
        scores = ms.ops.matmul(q, k.swapaxes(-1, -2)) * factor
        if mask is not None:
            scores = scores + mask["added"]
        return x + self.out(ms.ops.matmul(ms.ops.softmax(scores, -1), v))


class Net(nn.Cell):
    def __init__(self, names: str | list[str] = "qkv"):
        super().__init__()
        self.first, self.extra = nn.Dense(6, 8), nn.Dense(8, 8)
        self.blocks = nn.CellList([Attention(8, names) for _ in range(2)])
        rng = np.random.default_rng(0)
        for parameter in self.get_parameters():
            value = rng.integers(-2, 3, parameter.shape).astype("f4") / 8
            parameter.set_data(Tensor(value))

    def construct(self, x, context=None, extra=False):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, context, 0.5, mask={"added": ms.ops.zeros((1,), ms.float32)})
        return self.extra(x) if extra else x


def batch(seed: int, tokens: int = 64, channels: int = 6) -> Tensor:
    """Small integers: the sums over first's inputs are exact, in whatever order."""
    values = np.random.default_rng(seed).integers(-3, 4, (1, tokens, channels))
    return Tensor(values.astype("f4"))


def everything(observations: Observations) -> dict:
    """All of it, as values that can be compared."""
    stats = {group.paths[0]: group.stats for group in observations.groups}
    calls = {
        block: [
            (c.index, c.step, [_plain(v) for v in (*c.arguments, *c.named.values())]) for c in kept
        ]
        for block, kept in observations.windows.items()
    }
    return {
        "arrays": stats_arrays(stats),
        "facts": stats_facts(stats),
        "calls": calls,
        "groups": [(group.paths, group.block) for group in observations.groups],
        "rest": [getattr(observations, n) for n in ("calls", "tokens", "chosen", "searched")],
    }


def _plain(value):
    if isinstance(value, Tensor):
        return str(value.dtype), value.shape, value.asnumpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    return value


def _deep(value):
    if type(value) in (list, tuple):
        return type(value)(map(_deep, value))
    return {k: _deep(v) for k, v in value.items()} if isinstance(value, dict) else _plain(value)


SUMS = ("sum_squares", "sum_abs", "products")


def assert_same(found: Observations, expected: Observations, *, exact_sums: bool = False) -> None:
    one, other = everything(found), everything(expected)
    arrays, wanted = one.pop("arrays"), other.pop("arrays")
    assert one == other
    assert arrays.keys() == wanted.keys()
    for name, array in arrays.items():
        key = name.rpartition(".")[2]
        if key in SUMS and not exact_sums:
            np.testing.assert_allclose(array, wanted[name], rtol=1e-4, atol=1e-3, err_msg=name)
        else:
            np.testing.assert_array_equal(array, wanted[name], err_msg=name)


@pytest.mark.parametrize("cuts", [(8,), (4, 8), (8, 12)])
def test_parts_that_are_merged_are_the_whole(cuts):
    """Of 16 calls of 64 tokens every second row is kept, and calls of blocks of all."""
    data = [batch(seed) for seed in range(16)]
    whole = ms_quant.calibrate(Net(), data, algorithm=ALL)
    ends = [0, *cuts, 16]
    merged, *others = (
        ms_quant.calibrate(Net(), data[a:b], algorithm=ALL) for a, b in pairwise(ends)
    )
    before = everything(merged)
    for other in others:
        again = merged.merge(other)
        assert merged is not again
        merged = again
    assert_same(merged, whole)
    assert [group.block for group in merged.groups].count("blocks.0") == 2
    first, expected = merged["first"].stats, whole["first"].stats
    for name in SUMS:
        np.testing.assert_array_equal(getattr(first, name), getattr(expected, name), name)
    if len(others) == 1:  # the parts are as they were
        again = everything(ms_quant.calibrate(Net(), data[: cuts[0]], algorithm=ALL))
        assert before["facts"] == again["facts"] and before["rest"] == again["rest"]


def test_sums_of_parts_are_within_their_bound():
    data = [Tensor(np.random.default_rng(i).normal(size=(1, 64, 6)).astype("f4")) for i in range(6)]
    whole = ms_quant.calibrate(Net(), data, algorithm="gptq")["first"].stats
    merged = ms_quant.calibrate(Net(), data[:3], algorithm="gptq").merge(
        ms_quant.calibrate(Net(), data[3:], algorithm="gptq")
    )
    stats, x = merged["first"].stats, np.concatenate([t.asnumpy()[0] for t in data]).astype("f8")
    exact, sizes = x.T @ x, np.abs(x).T @ np.abs(x)
    for found in (whole, stats):
        error = np.abs(np.tril(found.products - exact))
        assert (error <= np.tril(len(x) * 2.0**-24 * sizes)).all()
        error = np.abs(found.sum_squares - np.diag(exact))
        assert (error <= 2 * len(x) * 2.0**-53 * np.diag(exact)).all()


@pytest.mark.parametrize("counts", [(700, 900), (1500, 100), (1, 2000), (600, 600, 600)])
def test_kept_tokens_are_spread_over_all_parts(counts):
    """Each is within a stride of the one that one pass keeps."""
    network = nn.SequentialCell(nn.Dense(1, 1))
    rows = np.arange(sum(counts), dtype=np.float32)[:, None]
    starts = np.cumsum([0, *counts])
    merged, *others = (
        ms_quant.calibrate(network, [Tensor(rows[a:b])]) for a, b in pairwise(starts)
    )
    for other in others:
        merged = merged.merge(other)
    kept = merged["0"].stats.rows[:, 0]
    whole = ms_quant.calibrate(network, [Tensor(rows)])["0"].stats.rows[:, 0]
    stride = whole[1] - whole[0]
    assert (np.diff(kept) > 0).all() and np.isin(kept, rows).all()
    assert abs(len(kept) - len(whole)) <= len(counts) and len(kept) <= 512
    assert (np.abs(kept[:, None] - whole).min(axis=0) <= stride).all()


def test_calls_of_blocks_are_spread_over_all_parts():
    data = [batch(seed, tokens=512) for seed in range(10)]
    parts = [ms_quant.calibrate(Net(), d, algorithm="osl") for d in (data[:7], data[7:])]
    merged = parts[0].merge(parts[1])
    assert len(merged.chosen) == 4 and list(chosen_calls(10, 5120)) == [0, 2, 5, 7]
    for index, wanted in zip(merged.chosen, [0, 2, 5, 7], strict=True):
        assert abs(index - wanted) <= 1
    assert [call.index for call in merged.windows["blocks.1"]] == list(merged.chosen)


def test_what_one_part_tells_apart_is_told_apart():
    """Self-attention alone looks like one group; as if all calls had been made at once."""
    own, cross = [batch(0), batch(1)], [(batch(2), batch(3, 9, 8)), (batch(4), batch(5, 9, 8))]
    kept = {"algorithm": ALL}
    whole = ms_quant.calibrate(Net(), own + cross, **kept)
    merged = ms_quant.calibrate(Net(), own, **kept).merge(ms_quant.calibrate(Net(), cross, **kept))
    assert ("blocks.0.k", "blocks.0.v") in [group.paths for group in merged.groups]
    assert_same(merged, whole)


def test_a_linear_that_one_part_does_not_reach():
    with_extra = [Tensor(batch(9).asnumpy()), None, True]
    whole = ms_quant.calibrate(Net(), [batch(8), tuple(with_extra)])
    merged = ms_quant.calibrate(Net(), [batch(8)]).merge(
        ms_quant.calibrate(Net(), [tuple(with_extra)])
    )
    assert merged["extra"].stats.tokens == 64
    assert_same(merged, whole)


def stepwise(seeds: range, steps: int):
    for seed in seeds:
        for step in range(steps):
            ms_quant.TimestepManager.set_timestep_idx(step)
            yield batch(seed * 10 + step)


def test_ranges_of_timesteps(tmp_path):
    """A part may have more steps than the other."""
    policy = ms_quant.TimestepPolicyConfig()

    def seen(seeds: range, steps: int) -> Observations:
        return ms_quant.calibrate(
            Net(), stepwise(seeds, steps), timestep_policy=policy, algorithm="osl"
        )

    assert_same(seen(range(2), 3).merge(seen(range(2, 4), 3)), seen(range(4), 3))
    short, long = seen(range(1), 2), seen(range(1, 2), 3)
    for merged in (short.merge(long), long.merge(short)):
        stats = merged["first"].stats
        assert stats.step_low.shape == (3, 6) and stats.seen_steps == {0, 1, 2}
        np.testing.assert_array_equal(stats.step_low[2], long["first"].stats.step_low[2])
    again = Observations.load(short.merge(long).save(tmp_path / "o.safetensors"))
    assert_same(again, short.merge(long), exact_sums=True)
    ms_quant.TimestepManager.set_timestep_idx(None)


DENSE = [Tensor(np.random.default_rng(0).normal(size=(5, 6)).astype("f4"))]


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({}, {"exclude": ["extra"]}, "extra: only one of two observations looked at it"),
        ({"include": ["first"]}, {}, "extra: only one of two observations looked at it"),
        ({}, {"algorithm": "gptq"}, "first: products of channels are there: True in one of two"),
        ({}, {"algorithm": "histogram"}, "first: a histogram is there: True in one of two"),
        ({"algorithm": "osl"}, {}, "first: calls of blocks are there: False in one of two"),
        ({}, {"blocks": ()}, "first: blocks were given: True in one of two"),
        (
            {},
            {"timestep_policy": ms_quant.TimestepPolicyConfig()},
            "first: ranges of timesteps are there: True in one of two",
        ),
    ],
)
def test_observations_of_other_things_are_not_merged(one, other, message):
    if "timestep_policy" in other:
        ms_quant.TimestepManager.set_timestep_idx_max(1)
    first, second = (
        ms_quant.calibrate(Net(), stepwise(range(1), 1), **kept) for kept in (one, other)
    )
    with pytest.raises(BadArgumentError, match=f"^{re.escape(message)}"):
        first.merge(second)
    ms_quant.TimestepManager.set_timestep_idx(None)
    ms_quant.TimestepManager.set_timestep_idx_max(None)


def test_observations_of_another_width_are_refused():
    wide, narrow = nn.SequentialCell(nn.Dense(8, 3)), nn.SequentialCell(nn.Dense(6, 3))
    one = ms_quant.calibrate(wide, [Tensor(np.ones((2, 8), "f4"))])
    other = ms_quant.calibrate(narrow, [Tensor(np.ones((2, 6), "f4"))])
    with pytest.raises(BadArgumentError, match=r"^0: channels are 6 in one of two observations, e"):
        one.merge(other)
    with pytest.raises(
        BadArgumentError, match=r"^0: calibrate saw 8 channels, expected the 6 that"
    ):
        ms_quant.quantize(narrow, "W8A8", calibration=one)


# Files


def test_what_is_written_is_read_again_and_quantizes_alike(tmp_path):
    data = [(batch(0), batch(1, 9, 8)), (batch(2), batch(3, 9, 8))]
    seen = ms_quant.calibrate(Net(), data, algorithm=ALL)
    path = seen.save(tmp_path / "new" / "o.safetensors")
    read = ms_quant.Observations.load(path)
    assert_same(read, seen, exact_sums=True)
    assert str(read) == str(seen)
    assert Path(read.save(tmp_path / "again")).read_bytes() == Path(path).read_bytes()
    made = [
        ms_quant.quantize(Net(), exclude=["extra"], calibration=found, algorithm="osl+gptq")
        for found in (data, seen, read)
    ]
    first = {name: p.asnumpy() for name, p in made[0].parameters_and_names()}
    for network in made[1:]:
        for name, parameter in network.parameters_and_names():
            np.testing.assert_array_equal(parameter.asnumpy(), first[name], err_msg=name)
    both = read.merge(Observations.load(path))
    assert both.calls == 4 and both["first"].stats.tokens == 2 * seen["first"].stats.tokens


class Odd(nn.Cell):
    """A block whose argument is whatever is given."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Dense(4, 4), nn.Dense(4, 4)

    def construct(self, x, more=None):
        return self.a(x) + self.b(x)


class Passing(nn.Cell):
    def __init__(self):
        super().__init__()
        self.blocks = nn.CellList([Odd()])

    def construct(self, x, more=None):
        return self.blocks[0](x, more=more)


VALUES = [
    None,
    True,
    3,
    -0.0,
    float("-inf"),
    "text",
    [1, (2.5, {"k": None, "t": (Tensor(np.float32([1, 2])),)})],
    Tensor(np.array([1, -2], np.int64)),
    Tensor(np.array([True, False])),
    Tensor(np.float32([0.5, 3]), ms.bfloat16),
    np.arange(3, dtype=np.int16),
]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_arguments_of_blocks_of_every_kind(value, tmp_path):
    call = {"x": Tensor(np.ones((2, 4), "f4")), "more": value}
    seen = ms_quant.calibrate(Passing(), [call], algorithm="osl")
    read = Observations.load(seen.save(tmp_path / "o"))
    (found,), (expected,) = read.windows["blocks.0"], seen.windows["blocks.0"]
    assert repr(_deep(found.named)) == repr(_deep(expected.named))


def test_an_argument_that_no_file_holds_is_refused(tmp_path):
    call = {"x": Tensor(np.ones((2, 4), "f4")), "more": {1, 2}}
    seen = ms_quant.calibrate(Passing(), [call], algorithm="osl")
    with pytest.raises(
        UnsupportedError, match=r"^blocks\.0: is called with \{1, 2\} \(set\), which"
    ):
        seen.save(tmp_path / "o")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def written(tmp_path_factory, blocking_mindspore):
    path = tmp_path_factory.mktemp("written") / "o.safetensors"
    ms_quant.calibrate(Net(), [batch(0), batch(1)], algorithm=ALL).save(path)
    file = open_file(path)
    return {name: file.read(name) for name in file.tensors}, json.loads(file.metadata[KEY])


def rewrite(path, arrays, facts) -> None:
    plans = [TensorPlan(name, array.dtype, array.shape) for name, array in arrays.items()]
    write_file(path, plans, lambda plan: arrays[plan.name], {KEY: json.dumps(facts)})


def set_in(facts, place: str, value) -> None:
    *parents, last = place.split("/")
    for key in parents:
        facts = facts[int(key) if isinstance(facts, list) else key]
    if value is ...:
        del facts[last]
    else:
        facts[int(last) if isinstance(facts, list) else last] = value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("version", 2, r"ms_quant\.observations: .* expected observations of version 1"),
        ("groups", ..., r"groups: missing, expected a list"),
        ("groups/0", 3, r"groups: holds 3, expected paths of linears"),
        ("groups/0/paths", ["extra"], r"groups: extra is in two groups, expected one"),
        ("groups/0/paths", ["none"], r"groups: none has no statistics of all tokens, exp"),
        ("stats/extra/total_tokens", None, r"groups: extra has no statistics of all tokens, exp"),
        ("stats/extra/start", 3, r"groups: extra has no statistics of all tokens, expected some"),
        ("groups/0/block", "blocks.1", r"groups: block 'blocks\.1' of first has no calls or is"),
        ("calls", "2", r"calls: is '2', expected an integer"),
        ("tokens", 1, r"tokens: is 1, expected at least one of each call"),
        ("chosen", [1, 0], r"chosen: is \[1, 0\], expected ascending calls of 2"),
        ("chosen", [0], r"block_calls: blocks\.0 has calls of others than chosen ones"),
        ("stats/first", [], r"first: is \[\], expected an object"),
        ("stats/first/channels", 5, r"stats\.first: low: is float32 \[6\], expected float32 \[5\]"),
        ("stats/first/channels", 1 << 50, r"stats\.first: low: is float32 \[6\], expected float32"),
        ("stats/first/tokens", 1 << 50, r"stats\.first: counts: are of 768 values, expected those"),
        ("stats/extra/keep_rows", 0, r"stats\.extra: keep_rows: is 0, expected 1 to"),
        ("stats/first/stride", None, r"stats\.first: stride: is None, expected an integer"),
        (
            "stats/first/histogram/ends",
            [1.0, -1.0],
            r"stats\.first: ends: are \[1\.0, -1\.0\], ",
        ),
        (
            "stats/first/histogram/first",
            0,
            r"stats\.first: histogram: exponent, first bin and ",
        ),
        ("stats/first/steps", 1 << 50, r"stats\.first: step_low: missing, expected float32 values"),
        ("block_calls/blocks.0/0", 1, r"calls\.blocks\.0: holds 1, expected a call"),
        ("block_calls/blocks.0/0/arguments/0/tensor", 99, r"calls\.blocks\.0\.99: missing, expect"),
        ("block_calls/blocks.0/0/arguments/0", {"a": 1, "b": 2}, r"calls\.blocks\.0: holds {.*a v"),
        (
            "block_calls/blocks.0/0/arguments/0",
            {"float": "x"},
            r"float: is 'x', expected a hexa",
        ),
        ("block_calls/blocks.0/0/step", "a", r"step: is 'a', expected an integer"),
    ],
)
def test_a_file_that_states_what_cannot_be_is_refused(written, tmp_path, place, value, message):
    arrays, facts = written[0], json.loads(json.dumps(written[1]))
    set_in(facts, place, value)
    rewrite(tmp_path / "o", arrays, facts)
    with pytest.raises(BadFileError, match=f"^{re.escape(str(tmp_path / 'o'))}: {message}"):
        Observations.load(tmp_path / "o")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("low", lambda a: None, r"low: missing, expected float32 values"),
        ("low", lambda a: a + np.float32(np.inf), r"low: holds NaN or inf, expected numbers"),
        ("low", lambda a: a + 9, r"low: is above high, expected at most that"),
        ("high", lambda a: a.astype("f8"), r"high: is float64 \[6\], expected float32 \[6\]"),
        ("products", lambda a: a[:5], r"products: is float32 \[5, 6\], expected float32 \[6, 6\]"),
        ("counts", lambda a: a * -1, r"counts: holds -\d+ to -?\d+, expected 0 to below"),
        ("counts", lambda a: a * 2, r"counts: are of 1536 values, expected those of 128 tokens"),
        ("rows", lambda a: a[:3], r"row_places: is int64 \[128\], expected int64 \[3\]"),
        ("row_places", lambda a: a[::-1].copy(), r"row_places: do not ascend, expected each place"),
        ("row_places", lambda a: a + 1, r"row_places: holds 1 to 128, expected 0 to below 128"),
    ],
)
def test_a_file_whose_tensors_are_damaged_is_refused(written, tmp_path, name, change, message):
    arrays, full = dict(written[0]), f"stats.first.{name}"
    changed = change(arrays.pop(full))
    if changed is not None:
        arrays[full] = changed
    rewrite(tmp_path / "o", arrays, written[1])
    where = re.escape(f"{tmp_path / 'o'}: stats.first: ")
    with pytest.raises(BadFileError, match=f"^{where}{message}"):
        Observations.load(tmp_path / "o")


def test_what_is_no_such_file_is_refused(tmp_path):
    with pytest.raises(BadFileError, match=r"none: no such file$"):
        Observations.load(tmp_path / "none")
    (tmp_path / "short").write_bytes(b"\x08\0")
    with pytest.raises(BadFileError, match=r"short: truncated, 2 bytes, expected at least 8"):
        Observations.load(tmp_path / "short")
    write_file(tmp_path / "other", [], lambda plan: np.zeros(0))
    message = r"other: ms_quant\.observations in the header: missing, expected a file of Observ"
    with pytest.raises(BadFileError, match=message):
        Observations.load(tmp_path / "other")


# Queries and keys


def codes(names: str | list[str], **options) -> list[np.ndarray]:
    data = [Tensor(np.random.default_rng(1).normal(size=(1, 24, 6)).astype("f4"))]
    network = ms_quant.quantize(
        Net(names),
        "W4A16",
        calibration=data,
        algorithm="awq",
        include=["blocks.*"],
        group_size=0,
        **options,
    )
    cells = [getattr(block, name) for block in network.blocks for name in names]
    return [cell.weight_scale.asnumpy() for cell in cells]


def test_queries_and_keys_are_those_that_the_user_names():
    """``awq`` does not clip them. Without a word they are known by the usual names."""
    named, other = ["q_proj", "k_proj", "v_proj"], ["to_q", "to_k", "to_v"]
    usual, unknown = codes(named), codes(other)
    told = codes(other, scores=["*.to_q", "*.to_k"])
    assert all(np.array_equal(a, b) for a, b in zip(usual, told, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(usual, unknown, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(unknown, codes(named, scores=()), strict=True))
    with pytest.raises(BadArgumentError, match=r"^pattern '\*\.query' matches no linear, expected"):
        codes(other, scores=["*.query"])
