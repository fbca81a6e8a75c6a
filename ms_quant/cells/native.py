"""The native kernels under MindSpore: called on a tensor's own memory, or as a custom operator."""

from __future__ import annotations

import warnings
from functools import lru_cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.api import _pynative_executor

from ms_quant import kernels
from ms_quant.kernels import PackedLinear, pack
from ms_quant.numerics.linear import QuantizedLinear

_HOOKS = ("_forward_pre_hook", "_forward_hook", "_backward_pre_hook", "_backward_hook")


class NativeLinear:
    """A packed linear.

    Args:
        packed: the linear.
    """

    def __init__(self, packed: PackedLinear):
        self.packed = packed
        self.threads = threads()
        self.weights = Tensor.from_numpy(packed.weights)
        self.params = Tensor.from_numpy(packed.params)
        decode = packed.params if packed.decode is None else packed.decode
        self.decode_params = Tensor.from_numpy(decode)
        outputs = packed.outputs
        self.operator = ops.Custom(
            f"{kernels.library_path()}:MsqLinearOp",
            out_shape=lambda rows, weights, params: (rows[0], outputs),
            out_dtype=lambda rows, weights, params: rows,
            func_type="aot",
        )
        kernels.set_operator_threads(self.threads)

    def __call__(self, rows: np.ndarray, decode: bool = False) -> np.ndarray:
        """float32 (rows, out) of float32 (rows, in)."""
        return self.packed(rows, decode, self.threads)


def threads() -> int:
    """As many as MindSpore uses, and no more than there are cores for this process."""
    return min(kernels.threads_of(None), ms.get_context("runtime_num_threads"))


def native_linear(linear: QuantizedLinear) -> NativeLinear | None:
    """The linear for the kernels, None where they have none for it."""
    if not kernels.available():
        _warn_once()
        return None
    packed = pack(linear)
    return None if packed is None else NativeLinear(packed)


@lru_cache(maxsize=1)
def _warn_once() -> None:
    warnings.warn(f"ms_quant: {kernels.note()}", stacklevel=4)


def calls_directly(cell: nn.Cell) -> bool:
    """Whether nothing wants to be told of a call in PyNative: no hook and no gradient."""
    return not (any(getattr(cell, name) for name in _HOOKS) or _pynative_executor.requires_grad())


def floats(x: Tensor) -> np.ndarray:
    """A tensor as a float32 array; its own memory, if that is its type."""
    return (x if x.dtype == ms.float32 else x.astype(ms.float32)).asnumpy()
