"""Tensor parallelism: how the parts of the ranks fit together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.models import ranks
from ms_quant.models.config import ModelConfig
from ms_quant.models.ranks import (
    VOCAB_MULTIPLE,
    Shard,
    fused_rows,
    fused_shape,
    padded_vocab,
    shard,
    vocab_rows,
)

__all__ = [
    "VOCAB_MULTIPLE",
    "Shard",
    "check_tp",
    "fused_rows",
    "fused_shape",
    "join",
    "padded_vocab",
    "same_bits",
    "shard",
    "vocab_part",
    "vocab_rows",
]


def check_tp(config: ModelConfig, tp: int) -> None:
    """Refuses a number of ranks that the model cannot be divided by.

    Raises:
        MsQuantError: names the number that is not divisible.
    """
    ranks.check_tp(config, tp)
    if tp > 1 and any(division.parts > 1 for division in config.divisions):
        raise BadArgumentError(
            f"tp is {tp}, expected 1: {config.model_type} has linears that are two in one, which "
            "are not divided here"
        )
    if config.hidden_size % tp:
        raise BadArgumentError(
            f"tp is {tp}, expected a divisor of hidden_size, which is {config.hidden_size}"
        )


def vocab_part(table: np.ndarray, rows: slice) -> np.ndarray:
    """Some rows of an embedding; those after its end are zero."""
    part = np.zeros((rows.stop - rows.start, table.shape[1]), table.dtype)
    found = table[rows]
    part[: len(found)] = found
    return part


def join(
    parts: Sequence[np.ndarray],
    places: Sequence[tuple[slice, ...]],
    shape: tuple[int, ...],
    name: str,
) -> np.ndarray:
    """Puts the ranks' parts of one tensor together.

    Args:
        parts: one array for each rank.
        places: where each belongs; two ranks have the same place or places that do not overlap.
        shape: of the whole.
        name: what the tensor is called, for the error.

    Raises:
        MsQuantError: two ranks hold the same part with different values.
    """
    whole = np.empty(shape, parts[0].dtype)
    owners: dict[tuple[tuple[int, int], ...], int] = {}
    for rank, (part, where) in enumerate(zip(parts, places, strict=True)):
        key = tuple((axis.start, axis.stop) for axis in where)
        owner = owners.setdefault(key, rank)
        if owner == rank:
            whole[where] = part
        elif not same_bits(part, parts[owner]):
            raise BadArgumentError(
                f"rank_{rank}: {name}: differs from rank_{owner}, expected a copy of it"
            )
    return whole


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one dtype and shape hold the same bytes; NaN equals itself."""
    raw = np.dtype(f"u{a.dtype.itemsize}")
    return np.array_equal(np.ascontiguousarray(a).view(raw), np.ascontiguousarray(b).view(raw))
