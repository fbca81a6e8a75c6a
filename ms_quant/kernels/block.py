"""What a decoder block does between its linears, natively; float32 in and out.

The sums of a row are taken in another order than elsewhere, so results differ in the last bits.
``threads`` is how many are used at most, None for all; ``isa`` a name from ``ISAS``, None for the
fastest instruction set there is, or for NumPy where the library is missing.
"""

from __future__ import annotations

import numpy as np

from ms_quant.kernels.native import available, call, number_of, threads_of
from ms_quant.numerics import layers


def rms_norm(
    x: np.ndarray,
    weight: np.ndarray,
    eps: float,
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis of (..., size)."""
    if isa is None and not available():
        return layers.rms_norm(x, weight, eps)
    x, y = np.ascontiguousarray(x, np.float32), np.empty(x.shape, np.float32)
    rows = x.size // weight.size
    pointers = x.ctypes.data, weight.ctypes.data, rows, weight.size, eps, y.ctypes.data
    call("msq_rms_norm", number_of(isa), *pointers, threads_of(threads))
    return y


def swiglu(
    gate: np.ndarray, up: np.ndarray, threads: int | None = None, isa: str | None = None
) -> np.ndarray:
    """gate / (1 + e^-gate) * up, of any shape."""
    if isa is None and not available():
        return layers.swiglu(gate, up)
    gate, up = np.ascontiguousarray(gate, np.float32), np.ascontiguousarray(up, np.float32)
    y = np.empty(gate.shape, np.float32)
    pointers = gate.ctypes.data, up.ctypes.data, gate.size, y.ctypes.data
    call("msq_swiglu", number_of(isa), *pointers, threads_of(threads))
    return y


def rope(
    x: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:
    """Rotary positions.

    Args:
        x: (batch, length, heads, size), size even.
        cos, sin: (length, size).

    Returns:
        (batch, heads, length, size).
    """
    if isa is None and not available():
        return layers.rope(x, cos, sin)
    batch, length, heads, size = x.shape
    x = np.ascontiguousarray(x, np.float32)
    cos, sin = np.ascontiguousarray(cos), np.ascontiguousarray(sin)
    y = np.empty((batch, heads, length, size), np.float32)
    pointers = x.ctypes.data, cos.ctypes.data, sin.ctypes.data
    call("msq_rope", number_of(isa), *pointers, *x.shape, y.ctypes.data, threads_of(threads))
    return y


def masked_softmax(
    scores: np.ndarray,
    mask: np.ndarray,
    scale: float,
    threads: int | None = None,
    isa: str | None = None,
) -> None:
    """Softmax of scores * scale + mask over the last axis, in place.

    Args:
        scores: (rows, T), contiguous; its rows go through the masks' rows again and again.
        mask: (masks, length, T); each serves as many rows as the others, one after the other.
        scale: factor on the scores.
    """
    if isa is None and not available():
        layers.masked_softmax(scores, mask, scale)
        return
    rows, columns = scores.shape
    mask = np.ascontiguousarray(mask, np.float32)
    each = max(mask.shape[1], rows // mask.shape[0])
    pointers = scores.ctypes.data, mask.ctypes.data, rows, columns, mask.shape[1], each, scale
    call("msq_softmax", number_of(isa), *pointers, threads_of(threads))


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray,
    scale: float,
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:
    """softmax(q k^T * scale + mask) v, made for many queries: keys and values are packed first.

    A key whose mask is below -1e29 has no weight; those after the last that any of 48 queries may
    look at are left out. A query that may look at none has the mean of all values.

    Args:
        q: (B, heads, S, D).
        k, v: (B, kv heads, T, D).
        mask: additive (B or 1, S, T).
        scale: factor on the scores.

    Returns:
        float32 (B, S, heads, D).
    """
    arrays = [np.ascontiguousarray(array, np.float32) for array in (q, k, v, mask)]
    batch, heads, length, size = q.shape
    y = np.empty((batch, length, heads, size), np.float32)
    sizes = batch, heads, k.shape[1], length, k.shape[2], size, len(mask)
    pointers = [array.ctypes.data for array in arrays]
    call(
        "msq_attention",
        number_of(isa),
        *pointers,
        *sizes,
        scale,
        y.ctypes.data,
        threads_of(threads),
    )
    return y
