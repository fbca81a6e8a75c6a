"""The native kernels under MindSpore: called on a tensor's own memory, or as a custom operator."""

from __future__ import annotations

import warnings
from functools import cache, lru_cache
from math import prod

import numpy as np
from mindspore import Tensor, float32, ops

from ms_quant import kernels
from ms_quant.kernels import PackedLinear, pack
from ms_quant.models.direct import threads
from ms_quant.numerics.linear import QuantizedLinear


class NativeLinear:
    """A packed linear.

    Args:
        packed: the linear.
        inputs: how many it has.
    """

    def __init__(self, packed: PackedLinear, inputs: int):
        self.packed, self.inputs = packed, inputs
        self.threads = threads()
        self.weights = Tensor.from_numpy(packed.weights)
        self.params = Tensor.from_numpy(packed.params)
        decode = packed.params if packed.decode is None else packed.decode
        self.decode_params = Tensor.from_numpy(decode)
        self.operator = _operator(packed.outputs)
        kernels.set_operator_threads(self.threads)

    def __call__(self, rows: np.ndarray, decode: bool = False) -> np.ndarray:
        """float32 (rows, out) of float32 (rows, in)."""
        return self.packed(rows, decode, self.threads)

    def of_tensor(self, x: Tensor, decode: bool = False) -> Tensor | None:
        """float32 (*, out) of float32 (*, in), without a NumPy array of the tensor, which takes
        longer to make than a small linear; None where the tensor's memory is not as it must be."""
        shape = x.shape
        if x.dtype != float32 or shape[-1] != self.inputs or not x.is_contiguous():
            return None
        address = x.data_ptr()  # waits for the tensor
        if not address:
            return None
        y = Tensor.from_numpy(np.empty((*shape[:-1], self.packed.outputs), np.float32))
        self.packed.write(address, prod(shape[:-1]), y.data_ptr(), decode, self.threads)
        return y


@cache
def _operator(outputs: int) -> ops.Custom:
    """The custom operator of linears with so many outputs; it takes long to make."""
    return ops.Custom(
        f"{kernels.library_path()}:MsqLinearOp",
        out_shape=lambda rows, weights, params: (rows[0], outputs),
        out_dtype=lambda rows, weights, params: rows,
        func_type="aot",
    )


def native_linear(linear: QuantizedLinear) -> NativeLinear | None:
    """The linear for the kernels, None where they have none for it."""
    if not kernels.available():
        _warn_once()
        return None
    packed = pack(linear)
    return None if packed is None else NativeLinear(packed, linear.weight.shape[1])


@lru_cache(maxsize=1)
def _warn_once() -> None:
    warnings.warn(f"ms_quant: {kernels.note()}", stacklevel=4)
