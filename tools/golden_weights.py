"""What the golden logits are computed from: weights and token ids, made from seeds.

``make_golden_logits.py`` gives these to transformers; the tests give the same ones to this
project, so no weights are stored. NumPy only.
"""

from __future__ import annotations

import zlib

import numpy as np

LENGTHS = (48, 31, 17)
SIDES = ("right", "left")
STRIDE = 5


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Float32 weights by sorted name: norms around 1, biases around 0, the rest keeps variance."""
    rng = np.random.default_rng(seed)
    return {name: _one(rng, name, shapes[name]) for name in sorted(shapes)}


def _one(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    # Uniform floats are integers times a power of two: every machine makes the same bits.
    uniform = (rng.random(shape, dtype=np.float32) - np.float32(0.5)) * np.float32(2)
    if name.endswith("norm.weight"):
        return np.float32(1) + np.float32(0.5) * uniform
    if name.endswith("bias"):
        return np.float32(0.5) * uniform
    # Queries and keys a little larger than the rest, so that positions change the attention.
    gain = 2.5 if "q_proj" in name or "k_proj" in name else 1.75
    return uniform * np.float32(gain / np.sqrt(shape[-1]))


def checksum(weights: dict[str, np.ndarray]) -> int:
    """Tells a change in these weights from a change in the model."""
    value = 0
    for name in sorted(weights):
        value = zlib.crc32(weights[name].tobytes(), zlib.crc32(name.encode(), value))
    return value


def batch(vocab_size: int, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask (3, 48), the same rows padded on the given side."""
    rng = np.random.default_rng(7)
    width = max(LENGTHS)
    ids = np.zeros((len(LENGTHS), width), np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place] = rng.integers(1, vocab_size, length)
        mask[row, place] = 1
    return ids, mask


def kept(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The compared positions: every STRIDE-th that is not padding, and each row's last."""
    rows = []
    for row, row_mask in zip(logits, mask, strict=True):
        places = np.flatnonzero(row_mask)
        rows.append(row[np.union1d(places[::STRIDE], places[-1:])])
    return np.concatenate(rows)
