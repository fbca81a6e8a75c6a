"""What a decoder block does between its linears, plainly: float32 in and out."""

from __future__ import annotations

import numpy as np


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis of (..., size)."""
    mean = np.square(x).mean(axis=-1, keepdims=True, dtype=np.float64)
    return x * (1 / np.sqrt(mean + eps)).astype(np.float32) * weight


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gate / (1 + e^-gate) * up, of any shape."""
    with np.errstate(over="ignore"):  # e^-gate is infinite then, and the result 0
        return gate / (1 + np.exp(-gate)) * up


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotary positions: (batch, length, heads, size) to (batch, heads, length, size).

    Args:
        x: size is even.
        cos, sin: (length, size).
    """
    x = x.transpose(0, 2, 1, 3)
    low, high = np.split(x, 2, axis=-1)
    return x * cos + np.concatenate((-high, low), axis=-1) * sin


def masked_softmax(scores: np.ndarray, mask: np.ndarray, scale: float) -> None:
    """Softmax of scores * scale + mask over the last axis, in place.

    Args:
        scores: (rows, T); its rows go through the masks' rows again and again.
        mask: (masks, length, T); each serves as many rows as the others, one after the other.
        scale: factor on the scores.
    """
    masks, length, columns = mask.shape
    held = scores.reshape(masks, -1, length, columns)
    held *= np.float32(scale)
    held += mask[:, None]
    held -= held.max(axis=-1, keepdims=True)
    np.exp(held, out=held)
    held /= held.sum(axis=-1, keepdims=True)
