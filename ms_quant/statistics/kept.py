"""What is kept of many tokens or calls: evenly spread ones, also after parts were merged."""

from __future__ import annotations

import numpy as np


def spread(count: int, wanted: int) -> np.ndarray:
    """int64 (wanted,): so many of the numbers below ``count``, evenly spread."""
    return np.arange(wanted) * count // max(1, wanted)


def nearest(places: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which of some places lie nearest to those that are wanted, each once; both ascend."""
    if not len(places):
        return np.zeros(0, np.int64)
    after = np.searchsorted(places, wanted).clip(0, len(places) - 1)
    before = np.maximum(after - 1, 0)
    closer = np.abs(wanted - places[before]) <= np.abs(places[after] - wanted)
    return np.unique(np.where(closer, before, after))


class KeptRows:
    """Rows of tokens, each with its place among all tokens and a label.

    Of a known number of tokens, those are kept whose place is a multiple of a stride. Where nobody
    knows the number, the rows are thinned out as they come.

    Args:
        channels: values of a row.
        total: how many tokens there will be, in all parts together; None where nobody knows.
        most: at most so many are kept.
        start: the place of the first token.
    """

    def __init__(self, channels: int, total: int | None, most: int, start: int = 0):
        self.total, self.most, self.start = total, most, start
        self.stride = 1 if total is None else _stride(total, most)
        self._none = np.zeros((0, channels), np.float32)
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    @property
    def rows(self) -> np.ndarray:
        """float32 (n, channels)."""
        return np.concatenate([part[0] for part in self._parts]) if self._parts else self._none

    @property
    def places(self) -> np.ndarray:
        """int64 (n,)."""
        return self._joined(1)

    @property
    def labels(self) -> np.ndarray:
        """int64 (n,)."""
        return self._joined(2)

    def _joined(self, which: int) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(part[which] for part in self._parts)])

    def add(self, rows: np.ndarray, seen: int, label: int = 0) -> None:
        """Keeps what must be kept of some tokens, before which ``seen`` tokens were seen."""
        first = -(self.start + seen) % self.stride
        kept = rows[first :: self.stride].copy()
        places = self.start + seen + np.arange(first, len(rows), self.stride)
        self._parts.append((kept, places, np.full(len(kept), label)))
        self._thin()

    def put(self, rows: np.ndarray, places: np.ndarray, labels: np.ndarray) -> None:
        """Keeps these in place of what was kept."""
        self._parts = [(rows, places, labels)]

    def merge(self, other: KeptRows) -> None:
        """Adds what was kept of the tokens after these."""
        while self.stride < other.stride:
            self._halve()
        every = self.stride // other.stride
        self._parts.append((other.rows[::every], other.places[::every], other.labels[::every]))
        self._thin()

    def moved(self, tokens: int, total: int, start: int) -> KeptRows:
        """What to keep where these ``tokens`` tokens are some of ``total`` and begin at ``start``.

        For each multiple of the new stride it is the nearest row that there is; where one lies
        there, that one, as if all had been seen at once.
        """
        made = KeptRows(self._none.shape[1], total, self.most, start)
        places = self.places - self.start + start
        wanted = np.arange(start + -start % made.stride, start + tokens, made.stride)
        chosen = nearest(places, wanted)
        made.put(self.rows[chosen], places[chosen], self.labels[chosen])
        return made

    def _thin(self) -> None:
        """Keeps every second row, as often as there are too many of an unknown number."""
        while self.total is None and sum(len(part[0]) for part in self._parts) > self.most:
            self._halve()

    def _halve(self) -> None:
        self.put(self.rows[::2], self.places[::2], self.labels[::2])
        self.stride *= 2


def _stride(total: int, most: int) -> int:
    return max(1, -(-total // most))
