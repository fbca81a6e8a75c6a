"""The key-value cache of a generation."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, ops

FIRST_TOKENS = 64  # that arrays have room for; they grow by half


class KeyValueCache:
    """Keys and values of one attention layer, for the tokens seen so far.

    Cells that launch MindSpore's operators call :meth:`append`, those that call native kernels
    :meth:`extend`; one generation does one of the two.
    """

    def __init__(self) -> None:
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._room = [np.empty((1, 1, 0, 1), np.float32)] * 2

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, heads, S, D) keys and values, and gives all of them, (B, heads, T, D)."""
        self.length += keys.shape[2]
        if self.keys is not None:
            keys = ops.concat((self.keys, keys), 2)
            values = ops.concat((self.values, values), 2)
        self.keys, self.values = keys, values
        return keys, values

    def extend(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same for float32 arrays; what is given are views."""
        start, self.length = self.length, self.length + keys.shape[2]
        for which, new in enumerate((keys, values)):
            if self._room[which].shape[2] < self.length:
                self._room[which] = self._grown(self._room[which][:, :, :start], new)
            self._room[which][:, :, start : self.length] = new
        held = [room[:, :, : self.length] for room in self._room]
        return held[0], held[1]

    def _grown(self, old: np.ndarray, new: np.ndarray) -> np.ndarray:
        batch, heads, _, size = new.shape
        room = np.empty((batch, heads, max(FIRST_TOKENS, self.length * 3 // 2), size), np.float32)
        room[:, :, : old.shape[2]] = old
        return room
