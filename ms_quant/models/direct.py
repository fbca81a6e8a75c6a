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
    step = max(1, SCORE_BYTES // (4 * batch * heads * k.shape[2]))
    if step >= length:
        return _attend_slice(q, k, v, mask)
    parts = [
        _attend_slice(q[:, :, start : start + step], k, v, mask[:, :, start : start + step])
        for start in range(0, length, step)
    ]
    return np.concatenate(parts, axis=2)


def _attend_slice(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    batch, heads, length, size = q.shape
    kv_heads, total = k.shape[1:3]
    shape = batch * kv_heads, heads // kv_heads * length, size  # heads that share keys are rows
    keys, values = (x.reshape(batch * kv_heads, total, size) for x in (k, v))
    scores = np.matmul(q.reshape(shape), keys.transpose(0, 2, 1))
    rows = scores.reshape(-1, total)
    kernels.masked_softmax(rows, mask[:, 0], 1.0 / math.sqrt(size), threads())
    return np.matmul(rows.reshape(scores.shape), values).reshape(q.shape)
