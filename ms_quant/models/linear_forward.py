"""What a linear computes on a CPU, float or quantized, as a function of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ms_quant import kernels
from ms_quant.numerics.activation import PhasedActivation
from ms_quant.numerics.linear import QuantizedLinear

Linear = Callable[[np.ndarray], np.ndarray]
"""float32 (rows, out) of float32 (rows, in)."""


@dataclass(frozen=True)
class FloatForward:
    """rows @ weight.T + bias.

    Attributes:
        weight: float32 (out, in).
        bias: float32 (out,) or None.
    """

    weight: np.ndarray
    bias: np.ndarray | None = None

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return kernels.matmul(rows, self.weight, self.bias)

    def step(self, rows: np.ndarray) -> np.ndarray:
        """The same, each row as if it were alone."""
        return kernels.row_products(rows, self.weight, self.bias)


@dataclass(frozen=True)
class ReadWhenCalled:
    """A linear of which nothing stays in memory.

    Attributes:
        read: gives the linear.
        out_features: rows of its weight.
    """

    read: Callable[[], Linear]
    out_features: int

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.zeros((0, self.out_features), np.float32)
        return self.read()(rows)

    def step(self, rows: np.ndarray) -> np.ndarray:
        """The same, each row as if it were alone."""
        return in_step(self.read())(rows) if len(rows) else self(rows)


class QuantizedForward:
    """A quantized linear by the kernels, or as its definition says where they have none for it.

    Args:
        linear: the linear.

    Attributes:
        phased: whether it tells prefill and decode apart.
    """

    def __init__(self, linear: QuantizedLinear):
        self.phased = isinstance(linear.activation, PhasedActivation)
        self._packed = kernels.pack(linear)
        self._linear: QuantizedLinear | None = linear
        self._values: np.ndarray | None = None
        if self._packed is None and not linear.integer:
            self._values = linear.grid.values(linear.weight)
        elif self._packed is not None and not kernels.transforms(linear):
            self._linear = None  # nothing of it is needed, its codes least

    def __call__(self, rows: np.ndarray, decode: bool = False) -> np.ndarray:
        """float32 (rows, out) of float32 (rows, in), in prefill or in decode."""
        if self._linear is not None:
            if self._packed is None:
                return self._linear.forward(rows, decode, values=self._values)
            rows = self._linear.transformed(rows)
        assert self._packed is not None
        return self._packed(rows, decode)

    def step(self, rows: np.ndarray) -> np.ndarray:
        """The same in decode, each row as if it were alone."""
        linear = self._linear
        if linear is None:
            assert self._packed is not None
            return self._packed.step(rows)
        if not len(rows):
            return self(rows, decode=True)
        if self._packed is not None:
            return self._packed.step(_one_by_one(linear.transformed, rows))
        if self._values is None or self.phased or linear.branch is not None:
            return _one_by_one(lambda row: linear.forward(row, True, values=self._values), rows)
        seen = _one_by_one(
            lambda row: linear.fake(linear.activation, linear.transformed(row)), rows
        )
        return kernels.row_products(seen, self._values, linear.bias)


def _one_by_one(function: Linear, rows: np.ndarray) -> np.ndarray:
    return np.concatenate([function(row[None]) for row in rows])


def in_step(linear: Linear) -> Linear:
    """What computes a linear for one token of each of several sequences."""
    if isinstance(linear, FloatForward | QuantizedForward | ReadWhenCalled):
        return linear.step
    return linear
