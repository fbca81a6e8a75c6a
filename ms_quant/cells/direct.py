"""Calls of native kernels on tensors' own memory, in place of MindSpore's operators.

On CPU in PyNative a Cell may do so where nothing wants to know what happens inside it.
"""

from __future__ import annotations

from functools import lru_cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from ms_quant import kernels

try:
    from mindspore.graph.api import _pynative_executor
except ImportError:  # before MindSpore 2.9
    from mindspore.common.api import _pynative_executor


@lru_cache(maxsize=1)
def threads() -> int:
    """As many as MindSpore uses, and no more than there are cores for this process."""
    return min(kernels.threads_of(None), ms.get_context("runtime_num_threads"))


def calls_directly(cell: nn.Cell) -> bool:
    """Whether nothing wants to be told of a call in PyNative: no hook and no gradient."""
    return not (
        cell._forward_pre_hook
        or cell._forward_hook
        or cell._backward_pre_hook
        or cell._backward_hook
        or wants_gradient()
    )


def wants_gradient() -> bool:
    """Whether what PyNative computes now will be derived."""
    return _pynative_executor.requires_grad()


class _Memory:
    """A tensor's memory as NumPy takes it in a third of the time of ``asnumpy``, which has NumPy
    parse the type."""

    def __init__(self, x: Tensor, address: int):
        self.tensor = x  # which must live as long as the array
        data = address, False
        self.__array_interface__ = {"shape": x.shape, "typestr": "=f4", "data": data, "version": 3}


def floats(x: Tensor) -> np.ndarray:
    """A tensor as a float32 array; its own memory, if that is its type."""
    if x.dtype != ms.float32:
        return x.astype(ms.float32).asnumpy()
    address = x.data_ptr() if x.is_contiguous() else 0
    return np.asarray(_Memory(x, address)) if address else x.asnumpy()


@lru_cache(maxsize=1)
def has_kernels() -> bool:
    """Whether this process computes on CPU and has the library."""
    return kernels.available() and ms.get_context("device_target") == "CPU"


def as_type(array: np.ndarray, dtype: ms.Type) -> Tensor:
    """An array's own memory as a tensor; of another type than float32 a copy."""
    y = Tensor.from_numpy(array)
    return y if dtype == ms.float32 else y.astype(dtype)


class Linear(nn.Dense):
    """A Dense layer whose product is not MindSpore's on CPU, where many rows go to AMX."""

    def __call__(self, x: Tensor) -> Tensor:
        floating = x.dtype == self.weight.dtype == ms.float32
        if not (floating and has_kernels() and calls_directly(self)):
            return super().__call__(x)
        rows = floats(x).reshape(-1, self.in_channels)
        bias = floats(self.bias) if self.has_bias else None
        y = kernels.matmul(rows, floats(self.weight), bias, threads())
        return Tensor.from_numpy(y.reshape(*x.shape[:-1], self.out_channels))
