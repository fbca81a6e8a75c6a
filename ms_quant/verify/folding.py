"""What folding did to a checkpoint, as far as its norms and its source tell.

A smoothing vector without a place of its own is divided out of what comes before: of a norm's gain,
which source and checkpoint both have, or of the rows of a linear, which are rounded afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import numpy as np

from ms_quant.files.reader import FloatTensors
from ms_quant.models.families import LinearGroup
from ms_quant.models.names import block_prefix
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
        if not self._is_active(index, group) or not group.feeds_from_norm:
            return None
        name = f"{block_prefix(index)}{group.feed}.weight"
        gain, stored = self.source.read_float32(name), self.ours.read_float32(name)
        live = stored != 0
        return np.where(live, gain / np.where(live, stored, 1), np.float32(1)).astype(np.float32)

    def is_unknown(self, index: int, group: LinearGroup) -> bool:
        """Whether a group's smoothing is in the rows of a linear, where it cannot be read."""
        feed = self.plan.feed(index, group)
        return self._is_active(index, group) and feed is not None and not group.feeds_from_norm

    def _is_active(self, index: int, group: LinearGroup) -> bool:
        return f"{block_prefix(index)}{group.name}" in self.active

    def scaled_rows(self, index: int) -> set[str]:
        """Linears of a block, by path in it, whose rows and bias others' smoothing divided."""
        groups = self.plan.groups(index)
        return {group.feed for group in groups if self.is_unknown(index, group)}

    def changed(self) -> set[str]:
        """Full names of the float tensors that folding may have changed."""
        names = set()
        for index in range(self.plan.config.num_layers):
            prefix = block_prefix(index)
            groups = [g for g in self.plan.groups(index) if self._is_active(index, g)]
            norms = {g.feed for g in groups if g.feeds_from_norm}
            names |= {f"{prefix}{norm}.weight" for norm in norms}
            names |= {f"{prefix}{path}.bias" for path in self.scaled_rows(index)}
        return names

    def problems(self, name: str) -> Iterator[str]:
        """What is wrong with a tensor that folding may have divided."""
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
