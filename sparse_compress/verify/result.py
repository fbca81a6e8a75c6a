"""What verifying a W8A8SC checkpoint found, for programs and as the JSON of the command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SparseVerification:
    """What :func:`sparse_compress.verify.checkpoint.verify` found.

    Attributes:
        checkpoint: the directory.
        source: what it was compared with; None where nothing was given.
        problems: what is wrong, one sentence each; empty when the checkpoint is right.
        notes: about files that nothing reads.
        checked: counts of ``linears``, ``tiles``, ``float_tensors`` and, with a source,
            ``recomputed`` or ``measured`` linears or ``compared`` tensors.
    """

    checkpoint: Path
    source: Path | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    checked: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """What the command prints of it."""
        return {
            "checkpoint": str(self.checkpoint),
            "source": None if self.source is None else str(self.source),
            "problems": list(self.problems),
            "notes": list(self.notes),
            "checked": dict(self.checked),
        }
