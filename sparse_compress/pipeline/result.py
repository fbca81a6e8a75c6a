"""What ``sparse-compress run`` has made, for programs and as its JSON."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sparse_compress.ranks.summary import RankSummary


@dataclass(frozen=True)
class SparseResult(RankSummary):
    """A W8A8SC checkpoint that was made.

    Attributes:
        not_served_by: why a runtime cannot load it, in sentences.
        finished_before: whether there was nothing left to do.
    """

    not_served_by: tuple[str, ...]
    finished_before: bool

    @classmethod
    def of(
        cls, summary: RankSummary, not_served_by: tuple[str, ...], finished_before: bool
    ) -> SparseResult:
        """The result from what the finished checkpoint is."""
        known = {field.name: getattr(summary, field.name) for field in fields(summary)}
        return cls(**known, not_served_by=not_served_by, finished_before=finished_before)

    def as_json(self) -> dict[str, Any]:
        """What the command prints of it."""
        return {
            **super().as_json(),
            "not_served_by": list(self.not_served_by),
            "finished_before": self.finished_before,
        }
