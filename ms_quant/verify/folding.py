"""What folding did to a checkpoint, as far as its norms and its source tell.

A smoothing vector without a place of its own is divided out of what comes before: of a norm's gain,
which source and checkpoint both have, or of the rows of a linear, which are rounded afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import numpy as np

from ms_quant.files.reader import FloatTensors
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.edge import Edge
from ms_quant.models.names import block_prefix, in_block
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

    def smooth(self, index: int, group: LinearGroup) -> np.ndarray | None:
        """float32 (in,): what a group's columns were multiplied by; None for nothing."""
        return self._of_norm(index, self.plan.config.block(index).producer_of(group))

    def _of_norm(self, index: int, edge: Edge | None) -> np.ndarray | None:
        if edge is None or not edge.norm or not self._is_active(index, edge):
            return None
        name = f"{block_prefix(index)}{edge.producer}.weight"
        gain, stored = self.source.read_float32(name), self.ours.read_float32(name)
        live = stored != 0
        return np.where(live, gain / np.where(live, stored, 1), np.float32(1)).astype(np.float32)

    def is_unknown(self, index: int, group: LinearGroup) -> bool:
        """Whether a group's smoothing is in the rows of a linear, where it cannot be read."""
        edge = self.plan.producer(index, group)
        return edge is not None and not edge.norm and self._is_active(index, edge)

    def _is_active(self, index: int, edge: Edge) -> bool:
        return any(f"{block_prefix(index)}{name}" in self.active for name in edge.consumers)

    def scaled_rows(self, index: int) -> set[str]:
        """Linears of a block, by path in it, whose rows and bias others' smoothing divided."""
        return {
            edge.producer
            for edge in self.plan.config.block(index).linear_edges
            if self.plan.holds_smoothing(index, edge) and self._is_active(index, edge)
        }

    def changed(self) -> set[str]:
        """Full names of the float tensors that folding may have changed."""
        names = set()
        for block in self.plan.config.stored_blocks:
            prefix, rows = block_prefix(block.index), self.scaled_rows(block.index)
            for edge in block.edges:
                active = self._is_active(block.index, edge) if edge.norm else edge.producer in rows
                if not active:
                    continue
                readers = (prefix + path for path in block.readers(edge))
                names |= {f"{path}.weight" for path in readers if not self.plan.layer_of(path)}
                names.add(f"{prefix}{edge.producer}.{'weight' if edge.norm else 'bias'}")
        return names

    def problems(self, name: str) -> Iterator[str]:
        """What is wrong with a tensor that folding may have changed."""
        smooth = self._reader_smooth(name)
        if smooth is not None:
            yield from self._reader_problems(name, smooth)
            return
        exact = self.source.read_float32(name)
        found = self.ours.read_float32(self.stored_name(name))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = np.where((exact == 0) & (found == 0), np.float32(1), found / exact)
        wrong = int(np.count_nonzero(~(np.isfinite(ratio) & (ratio > 0))))
        if wrong:
            yield (
                f"{name}: {wrong} of {found.size} values are no positive finite multiples of those "
                f"in {self.source.directory}"
            )

    def _reader_smooth(self, name: str) -> np.ndarray | None:
        """What the columns of a float linear were multiplied by, if that can be read."""
        found = in_block(name.removesuffix(".weight"))
        assert found is not None, name
        index, path = found
        return self._of_norm(index, self.plan.config.block(index).edge_of(path))

    def _reader_problems(self, name: str, smooth: np.ndarray) -> Iterator[str]:
        dtype, found = self.plan.dtype, self.ours.read_float32(self.stored_name(name))
        expected = (self.source.read_float32(name) * smooth).astype(dtype).astype(np.float32)
        wrong = int(np.count_nonzero(expected.view(np.uint32) != found.view(np.uint32)))
        if wrong:
            yield (
                f"{name}: {wrong} of {found.size} values are not those in "
                f"{self.source.directory} times what the norm before it was divided by"
            )
