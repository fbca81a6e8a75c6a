"""What calibration has seen: merged over parts of the data, written and read again."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant.files.safetensors_file import open_file
from ms_quant.files.writer import TensorPlan, write_file
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.config import ModelConfig, parse_config
from ms_quant.quantization.observe import GroupWanted, Wanted, observe
from ms_quant.statistics.observations import Observations
from ms_quant.statistics.observers import ActivationStats

RAW = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
WINDOWS, LENGTH = 7, 6


def config() -> ModelConfig:
    return parse_config(RAW)


def block() -> BlockForward:
    rng, shapes = np.random.default_rng(0), config().parameter_shapes()
    return BlockForward.load(
        config(), 0, lambda name: rng.normal(0, 0.2, shapes[name]).astype("f4")
    )


def hidden() -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.standard_normal((WINDOWS, LENGTH, 32)).astype("f4")


WANTED = Wanted(
    {
        "qkv": GroupWanted(9, hessian=True, histogram=True),
        "down": GroupWanted(5, hessian=False, histogram=True),
    },
    search_tokens=4 * LENGTH,
    cache=True,
    apart=True,
)


def seen(first: int, last: int, step: int) -> Observations:
    """The windows from ``first`` to before ``last``, some at a time."""
    batches = [hidden()[i : min(i + step, last)] for i in range(first, last, step)]
    return observe(
        block(), Positions(config(), LENGTH), batches, (WINDOWS, LENGTH, 32), WANTED, first=first
    )


def assert_equal(found: Observations, expected: Observations, *, sums: float) -> None:
    """``sums``: how far sums may be apart, relatively; all else is equal."""
    one, other = found.arrays(), expected.arrays()
    assert one.keys() == other.keys() and found.facts() == expected.facts()
    for name, array in one.items():
        if name.rpartition(".")[2] in ("sum_squares", "sum_abs", "products"):
            if name.endswith("products"):
                array, other[name] = np.tril(array), np.tril(other[name])
            np.testing.assert_allclose(array, other[name], rtol=sums, atol=sums, err_msg=name)
        else:
            np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 6), (4, 5)])
def test_parts_that_are_merged_in_order_are_the_whole(cuts: tuple[int, ...]) -> None:
    """But for sums, whose order is another. Windows come one by one: what a matrix product of more
    rows gives differs in its last bits."""
    ends = [0, *cuts, WINDOWS]
    first, *others = (seen(a, b, 1) for a, b in pairwise(ends))
    for other in others:
        first.merge(other)
    assert_equal(first, seen(0, WINDOWS, 1), sums=1e-5)


def test_what_is_written_is_read_again(tmp_path) -> None:
    whole = seen(0, WINDOWS, 3)
    whole.divided = {"mlp.up_proj": np.arange(48, dtype=np.int32)}
    arrays = whole.arrays()
    plans = [TensorPlan(name, array.dtype, array.shape) for name, array in arrays.items()]
    path = tmp_path / "observations.safetensors"
    write_file(path, plans, lambda plan: arrays[plan.name], {"facts": whole.facts()})
    file = open_file(path)
    read = {name: file.read(name) for name in file.tensors}
    assert_equal(Observations.restore(read, file.metadata["facts"]), whole, sums=0)
    again = Observations.restore(read, file.metadata["facts"])
    assert again.stats["qkv"].ranges[0].tobytes() == whole.stats["qkv"].ranges[0].tobytes()
    assert json.loads(again.facts())["stats"]["down"]["stride"] == 9  # 42 tokens, 5 rows


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    keep=st.integers(2, 16),
    split=st.booleans(),
)
def test_rows_of_an_unknown_number_of_tokens_are_spread_over_all(parts, keep, split) -> None:
    """An expert counts its own tokens: whatever their number, its rows are spread evenly."""
    total = sum(parts)
    rows = np.arange(total, dtype=np.float32)[:, None]
    whole, start = ActivationStats(1, None, keep), 0
    for count in parts:
        piece = rows[start : start + count]
        if split:
            other = ActivationStats(1, None, keep)
            other.update(piece)
            whole.merge(other)
        else:
            whole.update(piece)
        start += count
    kept = whole.rows[:, 0]
    assert whole.tokens == total
    assert len(kept) <= keep and len(kept) >= min(total, keep) // 2 - split * len(parts)
    assert np.isin(kept, rows).all() and (np.diff(kept) > 0).all()
    if not split and len(kept) > 1:
        assert len(set(np.diff(kept))) == 1 and kept[0] == 0
