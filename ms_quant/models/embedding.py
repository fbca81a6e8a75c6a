"""From token ids to the first hidden states, and from the last ones to losses, in bounded memory.

The tables of embedding and head have a row for each word of the vocabulary, often more than a
decoder block holds, so they pass through in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from ms_quant import kernels
from ms_quant.budget import BUDGET
from ms_quant.numerics.storage import DTYPES

Chunks = Iterable[tuple[int, np.ndarray]]
"""(first row, float32 rows) of a table, in order."""


def used_rows(chunks: Chunks, ids: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from ids to rows of a table; only rows whose ids occur are kept.

    Args:
        chunks: the table.
        ids: integer array of every id that will be looked up.
    """
    used, parts = np.unique(ids), []
    for start, rows in chunks:
        first, last = np.searchsorted(used, [start, start + len(rows)])
        if last > first:
            parts.append(rows[used[first:last] - start])
    table = np.concatenate(parts)
    return lambda wanted: table[np.searchsorted(used, wanted)]


class Table:
    """A table in memory: in bfloat16 where its numbers are that and there are kernels for it.

    Args:
        rows: float32 (vocab, hidden).
    """

    def __init__(self, rows: np.ndarray):
        self._held = rows
        if kernels.available():
            with np.errstate(all="ignore"):
                narrow = rows.astype(DTYPES["bfloat16"])
            if np.array_equal(narrow.astype(np.float32), rows):
                self._held = narrow

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """float32 (len(ids), hidden)."""
        return self._held[ids].astype(np.float32, copy=False)

    def matmul(self, x: np.ndarray) -> np.ndarray:
        """Logits, float32 (rows, vocab), of float32 (rows, hidden), each row as if alone."""
        return kernels.row_products(x, self._held)


def best_tokens(
    head: Chunks, rows: np.ndarray, logit_bytes: int = BUDGET.logit_bytes
) -> np.ndarray:
    """The token with the largest logit of each row; of equal ones the first.

    Args:
        head, rows, logit_bytes: as of :func:`cross_entropy`.

    Returns:
        int64 (tokens,).
    """
    top, found = np.full(len(rows), -np.inf, np.float32), np.zeros(len(rows), np.int64)
    for start, weight in head:
        step = max(1, logit_bytes // (4 * len(weight)))
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            logits = kernels.matmul(rows[part], weight)
            best = logits.argmax(axis=1)
            value = np.take_along_axis(logits, best[:, None], axis=1)[:, 0]
            found[part] = np.where(value > top[part], start + best, found[part])
            top[part] = np.maximum(top[part], value)
    return found


def cross_entropy(
    head: Chunks, rows: np.ndarray, targets: np.ndarray, logit_bytes: int = BUDGET.logit_bytes
) -> np.ndarray:
    """Negative log likelihood of each target under softmax(rows @ head.T).

    Args:
        head: float32 (vocab, hidden).
        rows: float32 (tokens, hidden), an array or a memory map.
        targets: integer (tokens,).
        logit_bytes: at most this many bytes of logits are held, but one token's at least.

    Returns:
        float64 (tokens,). Logits are float32, sums of exponentials float64.
    """
    top = np.full(len(rows), -np.inf)
    total, chosen = np.zeros(len(rows)), np.zeros(len(rows))
    for start, weight in head:
        step = max(1, logit_bytes // (4 * len(weight)))
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            logits = kernels.matmul(rows[part], weight)
            found = np.flatnonzero((targets[part] >= start) & (targets[part] < start + len(weight)))
            chosen[first + found] = logits[found, targets[part][found] - start]
            higher = np.maximum(top[part], logits.max(axis=1))
            exponentials = np.exp(logits - higher[:, None].astype(np.float32))
            total[part] *= np.exp(top[part] - higher)
            total[part] += exponentials.sum(axis=1, dtype=np.float64)
            top[part] = higher
    return np.log(total) + top - chosen
