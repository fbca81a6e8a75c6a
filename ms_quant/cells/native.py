"""The native kernels under MindSpore: called on a tensor's own memory, or as a custom operator."""

from __future__ import annotations

import warnings
from functools import cache, lru_cache
from math import prod

import numpy as np
from mindspore import Tensor, float32, ops

from ms_quant import kernels
from ms_quant.cells.direct import threads
from ms_quant.kernels import WatchedArrays, WatchedLinear, layout_of
from ms_quant.numerics.linear import QuantizedLinear


class NativeLinear:
    """A linear whose kernels follow its parameters.

    Args:
        linear: the linear.
        watched: its parameters' memory.
    """

    def __init__(self, linear: QuantizedLinear, watched: WatchedArrays):
        self.watched = WatchedLinear(linear, watched)
        self.inputs = linear.weight.shape[1]
        self.threads = threads()
        self.record = Tensor.from_numpy(self.watched.record)
        self.phases = tuple(Tensor(np.array([phase], np.int32)) for phase in (0, 1))
        self.operator = _operator(self.watched.outputs)
        kernels.set_operator_threads(self.threads)

    def __call__(self, rows: np.ndarray, decode: bool = False) -> np.ndarray:
        """float32 (rows, out) of float32 (rows, in)."""
        return self.watched(rows, decode, self.threads)

    def of_tensor(self, x: Tensor, decode: bool = False) -> Tensor | None:
        """float32 (*, out) of float32 (*, in), without a NumPy array of the tensor, which takes
        longer to make than a small linear; None where the tensor's memory is not as it must be."""
        shape = x.shape
        if x.dtype != float32 or shape[-1] != self.inputs or not x.is_contiguous():
            return None
        address = x.data_ptr()  # waits for all that MindSpore computes, assignments among it
        if not address:
            return None
        y = Tensor.from_numpy(np.empty((*shape[:-1], self.watched.outputs), np.float32))
        self.watched.write(address, prod(shape[:-1]), y.data_ptr(), decode, self.threads)
        return y


@cache
def _operator(outputs: int) -> ops.Custom:
    """The custom operator of linears with so many outputs; it takes long to make."""
    return ops.Custom(
        f"{kernels.library_path()}:MsqWatchedOp",
        out_shape=lambda rows, *more: (rows[0], outputs),
        out_dtype=lambda rows, *more: rows,
        func_type="aot",
    )


def native_linear(linear: QuantizedLinear, watched: WatchedArrays) -> NativeLinear | None:
    """The linear for the kernels, None where they have none for it."""
    if not kernels.available():
        _warn_once()
        return None
    return None if layout_of(linear) is None else NativeLinear(linear, watched)


@lru_cache(maxsize=1)
def _warn_once() -> None:
    warnings.warn(f"ms_quant: {kernels.note()}", stacklevel=4)
