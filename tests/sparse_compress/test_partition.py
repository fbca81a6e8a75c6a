"""Slices of tensor parallelism, against head numbers written down by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.models.config import ModelConfig, parse_config
from sparse_compress.layouts.partition import (
    check_tp,
    fused_rows,
    fused_shape,
    join,
    padded_vocab,
    same_bits,
    shard,
    vocab_part,
    vocab_rows,
)


def config(**changes: Any) -> ModelConfig:
    return parse_config(
        {
            "model_type": "qwen3",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 2,
            "vocab_size": 100,
            **changes,
        }
    )


# Which heads each rank holds: 8 query heads and 2 key and value heads.
HEADS = {
    1: ([[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 1]]),
    2: ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0], [1]]),
    4: ([[0, 1], [2, 3], [4, 5], [6, 7]], [[0], [0], [1], [1]]),
    8: ([[i] for i in range(8)], [[0], [0], [0], [0], [1], [1], [1], [1]]),
}


@pytest.mark.parametrize("tp", HEADS)
def test_heads_of_each_rank(tp: int) -> None:
    linears, (query, key_value) = config().block(0).linears, HEADS[tp]
    for rank in range(tp):
        for name, heads in (("q_proj", query), ("k_proj", key_value), ("v_proj", key_value)):
            where = shard(linears[f"self_attn.{name}"], tp, rank)
            rows = [head * 2 + i for head in heads[rank] for i in range(2)]
            assert list(range(100))[where.rows] == rows
            assert where.columns == slice(0, 16)
        where = shard(linears["self_attn.o_proj"], tp, rank)
        assert list(range(100))[where.columns] == [h * 2 + i for h in query[rank] for i in range(2)]
        assert where.rows == slice(0, 16)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_parts_join_to_the_whole(tp: int) -> None:
    for member, linear in config().block(0).linears.items():
        whole = np.arange(linear.size).reshape(linear.shape)
        shards = [shard(linear, tp, rank) for rank in range(tp)]
        both = [(part.rows, part.columns) for part in shards]
        parts = [whole[where] for where in both]
        np.testing.assert_array_equal(join(parts, both, linear.shape, member), whole)


def test_fused_shapes() -> None:
    block = config().block(0)
    shapes = {group.name: fused_shape(group, 4) for group in block.groups}
    assert shapes == {"qkv": (8, 16), "o": (16, 4), "gate_up": (12, 16), "down": (16, 6)}
    assert fused_rows(block.group("qkv"), 4) == {
        "self_attn.q_proj": slice(0, 4),
        "self_attn.k_proj": slice(4, 6),
        "self_attn.v_proj": slice(6, 8),
    }


def test_copies_that_differ_are_refused() -> None:
    whole = (slice(0, 2),)
    parts = [np.array([1, 2]), np.array([1, 2]), np.array([1, 3])]
    with pytest.raises(MsQuantError, match="rank_2: x: differs from rank_0, expected a copy"):
        join(parts, [whole] * 3, (2,), "x")


def test_same_bits_tells_zeros_apart_and_takes_nan_for_itself() -> None:
    zero = np.zeros(2, np.float16)
    assert not same_bits(zero, -zero)
    assert same_bits(np.full(2, np.nan, np.float16), np.full(2, np.nan, np.float16))


def test_vocabulary_is_padded_with_zero_rows() -> None:
    model = config()
    assert padded_vocab(model) == 128
    assert [vocab_rows(model, 4, rank) for rank in (0, 3)] == [slice(0, 32), slice(96, 128)]
    part = vocab_part(np.ones((4, 3), np.float16), slice(0, 32))
    assert part.shape == (32, 3)
    np.testing.assert_array_equal(part.sum(axis=1), [3] * 4 + [0] * 28)
    assert padded_vocab(config(vocab_size=128)) == 128


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({}, 0, "tp is 0, expected at least 1"),
        ({}, 3, "tp is 3, expected a divisor of num_attention_heads, which is 8"),
        ({"intermediate_size": 27}, 2, "divisor of intermediate_size, which is 27"),
        ({"hidden_size": 15}, 2, "divisor of hidden_size, which is 15"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 16},
            4,
            "divisor or a multiple of num_key_value_heads, which is 6",
        ),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 12, "hidden_size": 12},
            12,
            "divisor of the vocabulary padded to a multiple of 64, which is 128",
        ),
    ],
)
def test_ranks_that_do_not_divide_the_model_are_refused(
    changes: dict[str, Any], tp: int, message: str
) -> None:
    with pytest.raises(MsQuantError, match=message):
        check_tp(config(**changes), tp)
