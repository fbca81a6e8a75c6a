"""What a user wants of rate-distortion rounding."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ms_quant.errors import BadArgumentError

LEAST_RATIO = 0.199
"""Of a tile that holds nothing but pairs of d0: four engines of a header and 196 words."""


@dataclass(frozen=True)
class Goal:
    """One of two.

    Attributes:
        target_ratio: stored bytes over weights of the compressed linears, above 0 and below 1.
        max_ppl_increase: by how much the perplexity of held-out text may grow; 0.005 is 0.5 %.
        tokens: int32 (windows, tokens), the held-out text.
    """

    target_ratio: float | None = None
    max_ppl_increase: float | None = None
    tokens: np.ndarray | None = None

    def record(self) -> dict[str, Any]:
        """The goal as the output's record states it."""
        if self.tokens is None:
            return {"target_ratio": self.target_ratio}
        digest = hashlib.sha256(np.ascontiguousarray(self.tokens).tobytes()).hexdigest()
        return {"max_ppl_increase": self.max_ppl_increase, "heldout_sha256": digest}


def check_ratio(ratio: float) -> None:
    """Raises:
    MsQuantError: it is not between LEAST_RATIO and 1.
    """
    if not LEAST_RATIO < ratio < 1:
        raise BadArgumentError(
            f"target ratio is {ratio}, expected a number above {LEAST_RATIO}, which the format "
            "takes at least, and below 1"
        )
