"""The key-value cache of a generation."""

from __future__ import annotations

from mindspore import Tensor, ops


class KeyValueCache:
    """Keys and values of one attention layer, for the tokens seen so far."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, heads, S, D) keys and values, and gives all of them, (B, heads, T, D)."""
        if self.keys is not None:
            keys = ops.concat((self.keys, keys), 2)
            values = ops.concat((self.values, values), 2)
        self.keys, self.values = keys, values
        return keys, values
