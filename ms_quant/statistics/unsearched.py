"""The range of an input over the windows that searches do not look at."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

LOW, HIGH = "low", "high"


class UnsearchedRange:
    """The range of each channel of an input, without the tokens that candidates are tried on.

    A static range never clips the tokens that it was made of. Candidates that are tried on such
    tokens all look as if nothing were ever clipped, and the ones that equalise all channels, which
    clip the most in other texts, look best.

    Args:
        channels: size of the last axis, K.

    Attributes:
        low, high: float32 (K,), inf and -inf where no token was seen.
    """

    def __init__(self, channels: int):
        self.low = np.full(channels, np.inf, np.float32)
        self.high = np.full(channels, -np.inf, np.float32)

    def add(self, rows: np.ndarray, searched: np.ndarray) -> None:
        """Looks at whole windows, (windows * tokens, K), but those of a bool (windows,)."""
        if searched.all():
            return
        windows = rows.reshape(len(searched), -1, rows.shape[-1])[~searched]
        np.minimum(self.low, windows.min(axis=(0, 1)), out=self.low)
        np.maximum(self.high, windows.max(axis=(0, 1)), out=self.high)

    def merge(self, other: UnsearchedRange) -> None:
        """Adds what another part of the data has shown."""
        np.minimum(self.low, other.low, out=self.low)
        np.maximum(self.high, other.high, out=self.high)

    @property
    def range(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Both ends; None where searches look at every window."""
        return (self.low, self.high) if (self.low <= self.high).all() else None

    def arrays(self) -> dict[str, np.ndarray]:
        """Both ends by their names."""
        return {LOW: self.low, HIGH: self.high}

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray]) -> UnsearchedRange:
        """What :meth:`arrays` gave."""
        made = cls(0)
        made.low, made.high = arrays[LOW], arrays[HIGH]
        return made
