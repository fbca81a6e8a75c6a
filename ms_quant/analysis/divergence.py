"""How far what a model predicts is from what it predicts in float.

In the mean over texts that a model predicts as well as it can, the divergence is what quantizing
adds to the loss. Unlike a difference of losses it is never negative and needs few tokens.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ms_quant import kernels
from ms_quant.budget import BUDGET
from ms_quant.models.embedding import Chunks

ROWS = 512  # of one product with a piece of the head, which is read once for all of them


class Changed(Protocol):
    """The last hidden states of variants, an array or what makes one when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, variant: int, /) -> np.ndarray:
        """float32 (tokens, hidden)."""


def divergences(
    head: Chunks, exact: np.ndarray, changed: Changed, logit_bytes: int = BUDGET.logit_bytes
) -> np.ndarray:
    """Kullback-Leibler divergence of softmax(changed @ head.T) from softmax(exact @ head.T).

    Args:
        head: float32 (vocab, hidden), in pieces.
        exact: float32 (tokens, hidden).
        changed: the same of each variant, which is asked for once for each piece of the head.
        logit_bytes: of logits that are held at a time.

    Returns:
        float64 (variants, tokens), natural logarithm. Logits are float32, all else float64.
    """
    tokens, shape = len(exact), (len(changed), len(exact))
    top, total = np.full(tokens, -np.inf), np.zeros(tokens)
    tops, totals, gaps = np.full(shape, -np.inf), np.zeros(shape), np.zeros(shape)
    together = max(1, ROWS // tokens)
    for _, rows in head:
        step = max(1, logit_bytes // (8 * tokens * together))
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            logits = kernels.matmul(exact, part).astype(np.float64)
            shrink, weights = _exponentials(top, logits)
            total = total * shrink + weights.sum(axis=-1)
            gaps *= shrink
            for start in range(0, len(changed), together):
                some = slice(start, start + together)
                states = np.concatenate([changed[k] for k in range(*some.indices(len(changed)))])
                others = kernels.matmul(states, part).astype(np.float64)
                others = others.reshape(-1, tokens, len(part))
                gaps[some] += np.einsum("tv,ktv->kt", weights, logits - others)
                shrink, powers = _exponentials(tops[some], others)
                totals[some] = totals[some] * shrink + powers.sum(axis=-1)
    found = gaps / total - (top + np.log(total)) + (tops + np.log(totals))
    return np.maximum(found, 0)


def _exponentials(top: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What to multiply earlier sums by, and the exponentials; ``top`` becomes the new maximum."""
    higher = np.maximum(top, logits.max(axis=-1))
    shrink = np.exp(top - higher)
    top[:] = higher
    return shrink, np.exp(logits - higher[..., None])
