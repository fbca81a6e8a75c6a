"""What bounds the memory of calibration and evaluation, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """How much a forward computes at a time. Sums may round otherwise under another budget.

    Attributes:
        batch_tokens: of one forward of a block, but one window at least.
        queries: that attend at a time in NumPy: keys after the last of them are left out.
        score_bytes: of attention scores; longer sequences attend in slices of queries.
        logit_bytes: of the logits of some tokens.
        expert_bytes: of a block's experts in float32; where they are more, each is read when
            tokens come to it.
    """

    batch_tokens: int = 2048
    queries: int = 128
    score_bytes: int = 64 << 20
    logit_bytes: int = 64 << 20
    expert_bytes: int = 512 << 20

    def windows(self, length: int) -> int:
        """How many windows of so many tokens one forward takes."""
        return max(1, self.batch_tokens // length)


BUDGET = Budget()
SEARCH_TOKENS = 2048  # that a search looks at, but one window at least
