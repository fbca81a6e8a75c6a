"""What calibration has seen of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ms_quant.cells.calls import CallStore
from ms_quant.cells.tables import joined, table
from ms_quant.statistics.observers import ActivationStats


@dataclass(frozen=True, eq=False)
class GroupObservation:
    """What the linears of one group read.

    Attributes:
        paths: of the linears, which read one input.
        stats: of that input.
        block: path of the Cell whose output tells how good a candidate is; "" where the group's
            own outputs do.
    """

    paths: tuple[str, ...]
    stats: ActivationStats
    block: str = ""

    @property
    def outlier_ratio(self) -> float:
        """The largest magnitude of a channel over the median one; static and per-token ranges lose
        this factor of precision, which smoothing gets back."""
        absmax = self.stats.absmax
        middle = float(np.median(absmax)) if self.stats.tokens else 0.0
        return float(absmax.max(initial=0)) / middle if middle > 0 else float("inf")


@dataclass(frozen=True, eq=False)
class Observations:
    """What calibration has seen of a network's linears, made by :func:`ms_quant.calibrate`.

    Attributes:
        groups: in definition order of their first linears.
        calls: how often the network was called.
        searched: whether what block-wise searches run again was kept.
        windows: path of a block to calls of it, for searches.
    """

    groups: tuple[GroupObservation, ...] = ()
    calls: int = 0
    searched: bool = False
    windows: Mapping[str, CallStore] = field(default_factory=dict, repr=False)

    def __getitem__(self, path: str) -> GroupObservation:
        """The group of a linear, by its path."""
        return self._of_path[path]

    def __contains__(self, path: object) -> bool:
        return path in self._of_path

    @cached_property
    def _of_path(self) -> dict[str, GroupObservation]:
        return {path: group for group in self.groups for path in group.paths}

    def __str__(self) -> str:
        header = ("linears", "tokens", "low", "high", "max / median", "block")
        rows = [
            (
                joined(group.paths),
                str(group.stats.tokens),
                f"{group.stats.low.min(initial=0):.4g}" if group.stats.tokens else "-",
                f"{group.stats.high.max(initial=0):.4g}" if group.stats.tokens else "-",
                f"{group.outlier_ratio:.3g}" if group.stats.tokens else "-",
                group.block or "-",
            )
            for group in self.groups
        ]
        return table(header, rows)
