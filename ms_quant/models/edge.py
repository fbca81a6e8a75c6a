"""What makes the input of linears, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Edge:
    """What makes an input, and everything that reads it channel by channel.

    Attributes:
        producer: path of a norm, or of a linear whose output reaches the consumers.
        consumers: names of the groups that read it.
        norm: whether the producer is a norm.
        floats: paths of the linears that are never quantized and read it, too.
        repeats, size: the producer makes sets of ``size`` channels, each of which ``repeats``
            adjacent sets of a consumer's inputs are: the values of a head that several query heads
            read. (1, 1) where channel i is input i.
        skipped: before each set the producer makes so many channels that no consumer reads.
        fused: whether runtimes divide the norm's gain by static input scales, in the model's type,
            where there is one for each channel.
        averaged: whether inputs are means of what is made for several tokens, and so never exceed
            it.
    """

    producer: str
    consumers: tuple[str, ...]
    norm: bool = False
    floats: tuple[str, ...] = ()
    repeats: int = 1
    size: int = 1
    skipped: int = 0
    averaged: bool = False
    fused: bool = False

    def columns(self, rows: np.ndarray) -> np.ndarray:
        """What belongs to channels of the producer, by the inputs that read them."""
        if self.skipped:
            rows = rows.reshape(-1, self.skipped + self.size)[:, self.skipped :].reshape(-1)
        if self.repeats == 1:
            return rows
        return np.repeat(rows.reshape(-1, 1, self.size), self.repeats, axis=1).reshape(-1)

    def rows(self, columns: np.ndarray) -> np.ndarray:
        """What belongs to inputs, the same for all that read a channel, by those channels; 1 at
        channels that no consumer reads."""
        if self.repeats > 1:
            columns = columns.reshape(-1, self.repeats, self.size)[:, 0].reshape(-1)
        if not self.skipped:
            return columns
        sets = columns.reshape(-1, self.size)
        return np.pad(sets, ((0, 0), (self.skipped, 0)), constant_values=1).reshape(-1)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """What belongs to channels of the producer, 0 at those that no consumer reads."""
        if not self.skipped:
            return rows
        sets = rows.reshape(-1, self.skipped + self.size).copy()
        sets[:, : self.skipped] = 0
        return sets.reshape(-1)
