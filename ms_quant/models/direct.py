"""Calls of native kernels on tensors' own memory, in place of MindSpore's operators.

On CPU in PyNative a Cell may do so where nothing wants to know what happens inside it.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from ms_quant import kernels
from ms_quant.budget import SCORE_BYTES

try:
    from mindspore.graph.api import _pynative_executor
except ImportError:  # before MindSpore 2.9
    from mindspore.common.api import _pynative_executor

HIDDEN = -1e29  # masked keys have less, and no weight at all
QUERIES = 128  # that attend at a time: keys after the last of them are left out

_HOOKS = ("_forward_pre_hook", "_forward_hook", "_backward_pre_hook", "_backward_hook")


@lru_cache(maxsize=1)
def threads() -> int:
    """As many as MindSpore uses, and no more than there are cores for this process."""
    return min(kernels.threads_of(None), ms.get_context("runtime_num_threads"))


def calls_directly(cell: nn.Cell) -> bool:
    """Whether nothing wants to be told of a call in PyNative: no hook and no gradient."""
    return not (any(getattr(cell, name) for name in _HOOKS) or _pynative_executor.requires_grad())


def floats(x: Tensor) -> np.ndarray:
    """A tensor as a float32 array; its own memory, if that is its type."""
    return (x if x.dtype == ms.float32 else x.astype(ms.float32)).asnumpy()


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
        y = kernels.times(rows, floats(self.weight), bias, threads())
        return Tensor.from_numpy(y.reshape(*x.shape[:-1], self.out_channels))


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Attention with grouped key-value heads, in as few slices of queries as memory allows.

    Args:
        q: float32 (B, heads, S, D).
        k, v: float32 (B, kv heads, T, D).
        mask: additive float32 (B or 1, 1, S, T).

    Returns:
        float32 (B, heads, S, D).
    """
    batch, heads, length, _ = q.shape
    step = min(QUERIES, max(1, SCORE_BYTES // (4 * batch * heads * k.shape[2])))
    if step >= length:
        return _attend_slice(q, k, v, mask)
    y = np.empty(q.shape, np.float32)
    for start in range(0, length, step):
        part = slice(start, start + step)
        seen = _last_seen(mask[:, :, part])
        y[:, :, part] = _attend_slice(
            q[:, :, part], k[:, :, :seen], v[:, :, :seen], mask[:, :, part, :seen]
        )
    return y


def _last_seen(mask: np.ndarray) -> int:
    """How many keys there are up to the last that a query may look at; all if one sees none."""
    visible = mask > HIDDEN
    if not visible.any(axis=-1).all():
        return mask.shape[-1]  # such a query has the mean of all values
    return int(np.flatnonzero(visible.any(axis=(0, 1, 2)))[-1]) + 1


def _attend_slice(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    batch, heads, length, size = q.shape
    kv_heads, total = k.shape[1:3]
    shape = batch, kv_heads, heads // kv_heads * length, size  # heads that share keys are rows
    scores = np.matmul(q.reshape(shape), k.transpose(0, 1, 3, 2))
    rows = scores.reshape(-1, total)
    kernels.masked_softmax(rows, mask[:, 0], 1.0 / math.sqrt(size), threads())
    return np.matmul(scores, v).reshape(q.shape)
