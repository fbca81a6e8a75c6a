"""Tensor parallelism: which part of each tensor a runtime's rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from ms_quant.errors import MsQuantError
from ms_quant.models.config import ModelConfig
from ms_quant.models.families import LinearGroup

VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class Place:
    """The part of an (out, in) weight that one rank holds.

    Attributes:
        rows: output channels.
        columns: input channels.
    """

    rows: slice
    columns: slice


def padded_vocab(config: ModelConfig, multiple: int = VOCAB_MULTIPLE) -> int:
    """Rows of the embedding with its zero rows: the vocabulary, up to a multiple."""
    return -(-config.vocab_size // multiple) * multiple


def check_tp(config: ModelConfig, tp: int) -> None:
    """Refuses a number of ranks that the model cannot be divided by.

    Raises:
        MsQuantError: names the number that is not divisible.
    """
    if tp < 1:
        raise MsQuantError(f"tp is {tp}, expected at least 1")
    sizes = {
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        f"the vocabulary padded to a multiple of {VOCAB_MULTIPLE}": padded_vocab(config),
    }
    for name, size in sizes.items():
        if size % tp:
            raise MsQuantError(f"tp is {tp}, expected a divisor of {name}, which is {size}")
    kv_heads = config.num_kv_heads
    if kv_heads % tp and tp % kv_heads:
        raise MsQuantError(
            f"tp is {tp}, expected a divisor or a multiple of num_key_value_heads, "
            f"which is {kv_heads}"
        )


def place(config: ModelConfig, tp: int, rank: int, group: LinearGroup, member: str) -> Place:
    """The part of a linear that a rank holds.

    Key and value heads that are fewer than the ranks are held by several neighbouring ranks.

    Args:
        config: the model.
        tp: how many ranks there are.
        rank: 0 to tp - 1.
        group: the linear's group; ``"column"`` groups are split by rows of the weight.
        member: the linear's path, relative to its block.
    """
    units, width = _units(config, member)
    count = max(1, units // tp)
    first = rank * count if units >= tp else rank * units // tp
    share = slice(first * width, (first + count) * width)
    out_features, in_features = config.block(0).linears[member].shape
    if group.parallel == "column":
        return Place(share, slice(0, in_features))
    return Place(slice(0, out_features), share)


def _units(config: ModelConfig, member: str) -> tuple[int, int]:
    """What is divided over ranks and never cut: (how many, channels of each)."""
    name = member.rpartition(".")[2]
    if name in ("k_proj", "v_proj"):
        return config.num_kv_heads, config.head_dim
    if name in ("q_proj", "o_proj"):
        return config.num_heads, config.head_dim
    return config.intermediate_size, 1


def fused_rows(config: ModelConfig, tp: int, group: LinearGroup) -> dict[str, slice]:
    """Where each member's rows are in a rank's fused weight. The same on every rank."""
    rows, start = {}, 0
    for member in group.members:
        part = place(config, tp, 0, group, member).rows
        rows[member] = slice(start, start + part.stop - part.start)
        start = rows[member].stop
    return rows


def fused_shape(config: ModelConfig, tp: int, group: LinearGroup) -> tuple[int, int]:
    """(out, in) of a rank's fused weight."""
    columns = place(config, tp, 0, group, group.members[0]).columns
    rows = fused_rows(config, tp, group)[group.members[-1]].stop
    return rows, columns.stop - columns.start


def vocab_rows(config: ModelConfig, tp: int, rank: int, multiple: int = VOCAB_MULTIPLE) -> slice:
    """The rows of the padded embedding that a rank holds."""
    count = padded_vocab(config, multiple) // tp
    return slice(rank * count, (rank + 1) * count)
