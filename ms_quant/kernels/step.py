"""What a step of generation computes for several sequences at once, natively or in NumPy.

No number of one row or sequence depends on which others there are, nor on how many: what a server
says is the same, bit for bit, whoever else asks. A product by BLAS is not so.
``threads`` is how many are used at most, None for all; ``isa`` a name from ``ISAS``, None for the
fastest instruction set there is, or for NumPy where the library is missing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from ms_quant.kernels.native import available, call, number_of, threads_of
from ms_quant.numerics import layers

FLOAT32 = np.dtype(np.float32)


class _StepAttention(ctypes.Structure):
    """``MsqStepAttention`` of ``src/kernels.h``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("size", "value_size")),
        *((name, ctypes.c_void_p) for name in ("q", "keys", "values", "lengths")),
        *((name, ctypes.c_void_p) for name in ("key_strides", "value_strides")),
        ("scale", ctypes.c_float),
        ("y", ctypes.c_void_p),
        ("failed", ctypes.c_int32),
    ]


def row_products(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:
    """x @ weight.T + bias, each row as if it were alone.

    Args:
        x: float32 (rows, in).
        weight: float32 or bfloat16 (out, in), contiguous; bfloat16 needs the library.
        bias: float32 (out,) or None.

    Returns:
        float32 (rows, out). NaN and infinities go on as they do in any product.
    """
    x, y = np.ascontiguousarray(x, np.float32), np.empty((len(x), len(weight)), np.float32)
    if isa is None and not available():
        with np.errstate(all="ignore"):
            for row, out in zip(x, y, strict=True):
                np.matmul(weight, row, out=out)
            return y if bias is None else np.add(y, bias, out=y)
    weight = np.ascontiguousarray(weight)
    added = None if bias is None else np.ascontiguousarray(bias, np.float32)
    call(
        "msq_row_products",
        *(number_of(isa), weight.ctypes.data, weight.dtype != FLOAT32, *weight.shape),
        None if added is None else added.ctypes.data,
        *(x.ctypes.data, len(x), y.ctypes.data, threads_of(threads)),
    )
    return y


def step_attention(
    q: np.ndarray,
    keys: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    scale: float,
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:
    """Attention of sequences that have one query each.

    Args:
        q: float32 (sequences, heads, D).
        keys: of each sequence float32 (kv heads, T, D), each head contiguous.
        values: of each float32 (kv heads, T, E).
        scale: factor on the scores.

    Returns:
        float32 (sequences, heads, E).
    """
    made = values[0].shape[2]
    y = np.empty((*q.shape[:2], made), np.float32)
    if isa is None and not available():
        for query, key, value, out in zip(q, keys, values, y, strict=True):
            _attend(query, key, value, scale, out)
        return y
    q = np.ascontiguousarray(q, np.float32)
    keys, values = [_by_heads(k) for k in keys], [_by_heads(v) for v in values]
    addresses = np.array([[a.ctypes.data for a in held] for held in (keys, values)], np.uint64)
    numbers = np.array(
        [
            [key.shape[1] for key in keys],
            *([array.strides[0] // 4 for array in held] for held in (keys, values)),
        ],
        np.int64,
    )
    step = _StepAttention(
        *(len(q), q.shape[1], keys[0].shape[0], q.shape[2], made, q.ctypes.data),
        *(row.ctypes.data for row in (*addresses, *numbers)),
        *(scale, y.ctypes.data, 0),
    )
    call("msq_step_attention", number_of(isa), ctypes.byref(step), threads_of(threads))
    return y


def _by_heads(x: np.ndarray) -> np.ndarray:
    """The same with each head's rows one after the other."""
    size = x.shape[2] * x.itemsize
    in_order = x.dtype == FLOAT32 and x.strides[1:] == (size, x.itemsize)
    return x if in_order else np.ascontiguousarray(x, np.float32)


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, out: np.ndarray) -> None:
    grouped = q.reshape(len(k), -1, q.shape[1])
    scores = np.matmul(grouped, k.transpose(0, 2, 1))
    rows = scores.reshape(-1, k.shape[1])
    layers.masked_softmax(rows, np.zeros((1, 1, k.shape[1]), np.float32), scale)
    out[:] = np.matmul(scores, v).reshape(out.shape)
