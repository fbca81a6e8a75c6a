"""What folding did to a checkpoint, as far as its norms and its source tell.

A smoothing vector without a place of its own is divided out of what comes before: of a norm's gain
or the rows of a linear that is never quantized, which source and checkpoint both have, or of the
rows of a linear that is rounded afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field

import numpy as np

from ms_quant.files.reader import FloatTensors
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.edge import Edge
from ms_quant.models.names import block_prefix, in_block
from ms_quant.numerics.folding import gain_divisors, row_divisors, row_ratios
from ms_quant.plan.folding import changed_floats
from ms_quant.plan.plan import Plan


@dataclass(frozen=True)
class Folding:
    """Attributes:
    plan: what the checkpoint holds.
    ours: its tensors.
    source: those of the float model.
    active: the groups, by full path prefix, whose smoothing was folded.
    stored_name: the name in the checkpoint of a float tensor of the model.
    """

    plan: Plan
    ours: FloatTensors
    source: FloatTensors
    active: Container[str]
    stored_name: Callable[[str], str] = lambda name: name
    _active: dict[tuple[int, str], bool] = field(default_factory=dict, init=False)
    _known: dict[str, np.ndarray] = field(default_factory=dict, init=False)

    def smooth(self, index: int, group: LinearGroup) -> np.ndarray | None:
        """float32 (in,): what a group's columns were multiplied by; None for nothing."""
        return self._of(index, self.plan.config.block(index).producer_of(group))

    def _of(self, index: int, edge: Edge | None) -> np.ndarray | None:
        """What the columns of all that read an edge were multiplied by."""
        if edge is None or not self._is_active(index, edge) or not self._tells(index, edge):
            return None
        name = f"{block_prefix(index)}{edge.producer}.weight"
        if name not in self._known:
            self._known.clear()  # groups that read one input come one after the other
            self._known[name] = self._divisors(
                edge, self.source.read_float32(name), self._read(name)
            )
        return self._known[name]

    def _divisors(self, edge: Edge, source: np.ndarray, ours: np.ndarray) -> np.ndarray:
        others = self.plan.foreign  # who take vectors of any numbers
        if edge.norm:
            return gain_divisors(source, ours, bool(edge.floats) and not others)
        rows = row_ratios(source, ours) if others else row_divisors(source, ours)
        return edge.columns(rows).astype(np.float32)

    def _tells(self, index: int, edge: Edge) -> bool:
        """Whether what makes an input is stored as it was divided."""
        return edge.norm or self.plan.config.block(index).group_of(edge.producer) is None

    def _read(self, name: str) -> np.ndarray:
        return self.ours.read_float32(self.stored_name(name))

    def is_unknown(self, index: int, group: LinearGroup) -> bool:
        """Whether a group's smoothing is in the rows of a linear, where it cannot be read."""
        edge = self.plan.producer(index, group)
        return edge is not None and self._is_active(index, edge) and not self._tells(index, edge)

    def _is_active(self, index: int, edge: Edge) -> bool:
        key = index, edge.producer
        if key not in self._active:
            names = (f"{block_prefix(index)}{name}" for name in edge.consumers)
            held = self.plan.holds_smoothing(index, edge)
            self._active[key] = held and any(name in self.active for name in names)
        return self._active[key]

    def scaled_rows(self, index: int) -> set[str]:
        """Linears of a block, by path in it, whose rows and bias others' smoothing divided."""
        return {
            edge.producer
            for edge in self.plan.config.block(index).linear_edges
            if self._is_active(index, edge) and not self._tells(index, edge)
        }

    def changed(self) -> set[str]:
        """Full names of the float tensors that folding may have changed."""
        return {
            f"{block_prefix(block.index)}{name}"
            for block in self.plan.config.stored_blocks
            for edge in block.edges
            if self._is_active(block.index, edge)
            for name in changed_floats(self.plan, block.index, edge)
        }

    def problems(self, name: str) -> Iterator[str]:
        """What is wrong with a tensor that folding may have changed."""
        found = in_block(name.removesuffix(".weight"))
        block = self.plan.config.block(found[0]) if found else None
        if found and block and name.endswith(".weight"):
            index, path = found
            columns = self._of(index, block.edge_of(path))
            made = next((e for e in block.linear_edges if e.producer == path), None)
            rows = None if made is None else self._of(index, made)
            if columns is not None or rows is not None:
                divisors = None if made is None or rows is None else made.rows(rows)
                yield from self._linear_problems(name, columns, divisors)
                return
        exact, stored = self.source.read_float32(name), self._read(name)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = np.where((exact == 0) & (stored == 0), np.float32(1), stored / exact)
        wrong = int(np.count_nonzero(~(np.isfinite(ratio) & (ratio > 0))))
        if wrong:
            yield (
                f"{name}: {wrong} of {stored.size} values are no positive finite multiples of "
                f"those in {self.source.directory}"
            )

    def _linear_problems(
        self, name: str, columns: np.ndarray | None, rows: np.ndarray | None
    ) -> Iterator[str]:
        """Of a float linear whose columns were multiplied, or whose rows were divided."""
        dtype, found, made = self.plan.dtype, self._read(name), self.source.read_float32(name)
        with np.errstate(over="ignore"):
            if rows is not None:
                made = made / rows[:, None]
            if columns is not None:
                made = made * columns
            expected = made.astype(dtype).astype(np.float32)
        wrong = int(np.count_nonzero(expected.view(np.uint32) != found.view(np.uint32)))
        if wrong:
            what = (
                "times what the norm before it was divided by"
                if rows is None
                else "with each row divided by a number of its own"
            )
            yield (
                f"{name}: {wrong} of {found.size} values are not those in "
                f"{self.source.directory} {what}"
            )
