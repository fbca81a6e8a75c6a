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
