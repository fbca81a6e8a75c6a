"""Tensor parallelism: which part of each tensor a runtime's rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from ms_quant.errors import BadArgumentError
from ms_quant.models.block_spec import LinearGroup, LinearSpec
from ms_quant.models.config import ModelConfig

VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class Shard:
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
        raise BadArgumentError(f"tp is {tp}, expected at least 1")
    whole = [d for d in config.divisions if d.parallel != "replicated" and not d.copied]
    vocab = f"the vocabulary padded to a multiple of {VOCAB_MULTIPLE}"
    sizes = [(division.unit, division.units) for division in whole]
    for name, size in [*sizes, (vocab, padded_vocab(config))]:
        if size % tp:
            raise BadArgumentError(f"tp is {tp}, expected a divisor of {name}, which is {size}")
    for name, size in [(d.unit, d.units) for d in config.divisions if d.copied]:
        if size % tp and tp % size:
            raise BadArgumentError(
                f"tp is {tp}, expected a divisor or a multiple of {name}, which is {size}"
            )


def shard(linear: LinearSpec, tp: int, rank: int) -> Shard:
    """The part of a linear that a rank holds. Of two linears in one it is as large, elsewhere.

    Units that are fewer than the ranks, key and value heads, are held by several neighbouring
    ranks.

    Args:
        linear: the linear.
        tp: how many ranks there are.
        rank: 0 to tp - 1.
    """
    division, (rows, columns) = linear.division, linear.shape
    if division.parallel == "replicated":
        return Shard(slice(0, rows), slice(0, columns))
    column, units = division.parallel == "column", division.units
    width, count = (rows if column else columns) // units, max(1, units // tp)
    first = rank * count if units >= tp else rank * units // tp
    share = slice(first * width, (first + count) * width)
    return Shard(share, slice(0, columns)) if column else Shard(slice(0, rows), share)


def fused_rows(group: LinearGroup, tp: int) -> dict[str, slice]:
    """Where each member's rows are in a rank's fused weight. The same on every rank."""
    rows, start = {}, 0
    for member, linear in group.linears.items():
        part = shard(linear, tp, 0).rows
        rows[member] = slice(start, start + part.stop - part.start)
        start = rows[member].stop
    return rows


def fused_shape(group: LinearGroup, tp: int) -> tuple[int, int]:
    """(out, in) of a rank's fused weight."""
    columns = shard(group.first, tp, 0).columns
    rows = fused_rows(group, tp)[group.members[-1]].stop
    return rows, columns.stop - columns.start


def vocab_rows(config: ModelConfig, tp: int, rank: int, multiple: int = VOCAB_MULTIPLE) -> slice:
    """The rows of the padded embedding that a rank holds."""
    count = padded_vocab(config, multiple) // tp
    return slice(rank * count, (rank + 1) * count)
