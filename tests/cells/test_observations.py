"""What calibration has seen of a network, merged over parts of the data."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("mindspore")

from mindspore import Tensor, nn
from observed_network import ALL, SUMS, Net, assert_same, batch, everything

import ms_quant
from ms_quant.cells.blocks import chosen_calls
from ms_quant.cells.observations import Observations
from ms_quant.errors import BadArgumentError

pytestmark = pytest.mark.usefixtures("blocking_mindspore")


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
        found, exact = getattr(first, name), getattr(expected, name)
        if name == "products":  # of tokens of one length, whose sums are rounded
            np.testing.assert_allclose(found, exact, rtol=0, atol=16 * 64 * 2.0**-24 * exact.max())
        else:
            np.testing.assert_array_equal(found, exact, name)
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
    even = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True))
    products, sizes, exact = even.T @ even, np.abs(even).T @ np.abs(even), x.T @ x
    for found in (whole, stats):
        error = np.abs(np.tril(found.products - products))
        assert (error <= np.tril((len(x) + 3) * 2.0**-24 * sizes)).all()
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
