"""How far what a model predicts is from what another does, in bounded memory.

Both heads pass once, piece by piece of the vocabulary, over the last hidden states of both models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ms_quant import kernels
from ms_quant.budget import BUDGET
from ms_quant.models.embedding import Chunks


class LastStates(Protocol):
    """Last hidden states behind the last norm, in memory or on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray:
        """float32 (tokens, hidden)."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """How two models agree on each next token.

    Attributes:
        divergences: Kullback-Leibler divergence of the model from the other, natural logarithm,
            float64 (tokens,).
        same: whether both find the same token likeliest; of equal ones the first counts.
    """

    divergences: np.ndarray
    same: np.ndarray


class _Side:
    """The running sums of one model.

    Attributes:
        top: the largest logit.
        best: its token.
        total: sum of the exponentials, relative to ``top``.
    """

    def __init__(self, tokens: int):
        self.top = np.full(tokens, -np.inf)
        self.best = np.zeros(tokens, np.int64)
        self.total = np.zeros(tokens)

    def add(self, part: slice, start: int, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Adds logits of some tokens.

        Returns:
            What earlier sums are to be multiplied with, and the exponentials.
        """
        best = logits.argmax(axis=1)
        value = np.take_along_axis(logits, best[:, None], axis=1)[:, 0]
        higher = np.maximum(self.top[part], value)
        self.best[part] = np.where(value > self.top[part], start + best, self.best[part])
        shrink = np.exp(self.top[part] - higher)
        powers = np.exp(logits - higher[:, None])
        self.total[part] = self.total[part] * shrink + powers.sum(axis=1)
        self.top[part] = higher
        return shrink, powers

    @property
    def normalizer(self) -> np.ndarray:
        """Logarithm of the sum of all exponentials."""
        return self.top + np.log(self.total)


def agreement(
    head: Chunks,
    states: LastStates,
    other_head: Chunks,
    other_states: LastStates,
    logit_bytes: int = BUDGET.logit_bytes,
) -> Agreement:
    """How the predictions of a model agree with those of another.

    Args:
        head: of the model, float32 (vocab, hidden), in pieces.
        states: its last hidden states, (tokens, hidden).
        other_head, other_states: of the other; its hidden size may be another.
        logit_bytes: of logits that are held at a time.
    """
    count = len(states)
    model, other, gaps = _Side(count), _Side(count), np.zeros(count)
    for start, ours, theirs in _pieces(head, other_head):
        step = max(1, logit_bytes // (40 * len(ours)))  # logits, and float64 of them
        for first in range(0, count, step):
            part = slice(first, first + step)
            logits = kernels.matmul(states[part], ours).astype(np.float64)
            exact = kernels.matmul(other_states[part], theirs).astype(np.float64)
            shrink, weights = other.add(part, start, exact)
            model.add(part, start, logits)
            gaps[part] = gaps[part] * shrink + np.einsum("tv,tv->t", weights, exact - logits)
    found = gaps / other.total - other.normalizer + model.normalizer
    return Agreement(np.maximum(found, 0), model.best == other.best)


def _pieces(
    ours: Iterable[tuple[int, np.ndarray]], theirs: Iterable[tuple[int, np.ndarray]]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The same rows of two tables, whose pieces may end elsewhere."""
    others = iter(theirs)
    held = np.empty((0, 0), np.float32)
    for start, rows in ours:
        done = 0
        while done < len(rows):
            if not len(held):
                _, held = next(others)
            count = min(len(rows) - done, len(held))
            yield start + done, rows[done : done + count], held[:count]
            done, held = done + count, held[count:]
