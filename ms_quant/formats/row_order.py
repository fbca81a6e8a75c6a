"""Reading tensors whose rows a format stores in another order than the model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ms_quant.files.reader import Checkpoint
from ms_quant.files.safetensors_file import StoredRows
from ms_quant.formats.format import CheckpointFormat
from ms_quant.models.names import block_prefix
from ms_quant.models.rotary_rows import RotaryRows
from ms_quant.plan.plan import Plan


class InModelOrder(Checkpoint):
    """A checkpoint that gives the rows of its tensors in the order of the model.

    Args:
        checkpoint: the same as it is stored.
        orders: path of a linear to the order in which its rows are stored.
        suffixes: of its tensors that have its rows.
    """

    def __init__(
        self, checkpoint: Checkpoint, orders: Mapping[str, RotaryRows], suffixes: frozenset[str]
    ):
        super().__init__(checkpoint.directory, rename=checkpoint.rename)
        self._orders, self._suffixes = orders, suffixes

    def read(self, name: str) -> np.ndarray:
        return self._restored(name, super().read(name))

    def float_chunks(
        self,
        name: str,
        rows: slice | None = None,
        *,
        elements: int | None = None,
        dtype: np.dtype | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        pieces = super().float_chunks(name, rows, elements=elements, dtype=dtype)
        if self._order(name) is None:
            yield from pieces
            return
        parts = super().float_chunks(name, dtype=dtype)
        whole = self._restored(name, np.concatenate([part for _, part in parts]))
        for start, part in pieces:
            yield start, whole[start : start + len(part)]

    def stored_rows(self, name: str, start: int, stop: int) -> StoredRows | None:
        return None if self._order(name) else super().stored_rows(name, start, stop)

    def _order(self, name: str) -> RotaryRows | None:
        path, _, suffix = name.rpartition(".")
        return self._orders.get(path) if suffix in self._suffixes else None

    def _restored(self, name: str, stored: np.ndarray) -> np.ndarray:
        order = self._order(name)
        if order is None:
            return stored
        restored = np.empty_like(stored)
        restored[order.halves(len(stored))] = stored
        return restored


def in_model_order(format: CheckpointFormat, plan: Plan, checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of a plan, as the model has its rows."""
    orders = {
        f"{block_prefix(block.index)}{path}": order
        for block in plan.config.stored_blocks
        for path, spec in block.linears.items()
        if (order := format.row_order(plan.config, block.index, spec)) is not None
    }
    return InModelOrder(checkpoint, orders, format.by_row) if orders else checkpoint
