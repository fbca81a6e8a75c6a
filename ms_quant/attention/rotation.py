"""Rotations of queries and keys: random signs times Walsh's matrix / sqrt(size).

With an orthogonal R, (q R) (k R)^T = q k^T: scores stay what they are, and outliers of a channel
spread over all channels. That helps integer grids and costs a float grid precision: which kinds it
pays for is measured by ``benchmarks/attention_quant.py``. Values are never rotated.

MindIE-SD draws the signs from torch's generator with seed 1234; without torch these cannot be drawn
again, and ours differ. Both are right, as q and k only have to be rotated alike.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ms_quant.errors import BadArgumentError
from ms_quant.numerics.minifloat import finite_float32
from ms_quant.numerics.rotation import random_hadamard

SEED = 1234
# The largest entry of R R^T - I: of float32 entries about size * 2**-24, of bf16 ones 2**-7.
TOLERANCE = 1e-2


def walsh_rotation(size: int, seed: int = SEED) -> np.ndarray:
    """diag(signs) @ Walsh(size) / sqrt(size), float32 (size, size), the same for q and k.

    Raises:
        MsQuantError: ``size`` is not a power of two.
    """
    if size < 1 or size & (size - 1):
        raise BadArgumentError(f"rotation: heads of size {size}, expected a power of two")
    return random_hadamard(size, seed, "rotation").astype(np.float32)


def check_rotation(matrix: ArrayLike, size: int, name: str = "q_rot") -> np.ndarray:
    """A stored rotation in float32.

    Raises:
        MsQuantError: it is not (size, size), not finite, or not orthogonal; names it.
    """
    rotation = finite_float32(matrix, name)
    if rotation.shape != (size, size):
        raise BadArgumentError(f"{name}: shape {rotation.shape}, expected ({size}, {size})")
    wide = rotation.astype(np.float64)
    off = float(np.abs(wide @ wide.T - np.eye(size)).max())
    if off > TOLERANCE:
        raise BadArgumentError(
            f"{name}: {name} @ {name}^T is off the identity by {off:.3g}, "
            f"expected an orthogonal matrix (at most {TOLERANCE:g})"
        )
    return rotation


def check_pair(q_rot: ArrayLike | None, k_rot: ArrayLike | None, size: int) -> None:
    """Refuses rotations that would change scores: both or none, and q_rot @ k_rot^T = I.

    Raises:
        MsQuantError: only one is given, one is not orthogonal, or they differ.
    """
    if q_rot is None and k_rot is None:
        return
    if q_rot is None or k_rot is None:
        missing = "q_rot" if q_rot is None else "k_rot"
        raise BadArgumentError(f"{missing}: not given, expected both of q_rot and k_rot or none")
    one = check_rotation(q_rot, size, "q_rot").astype(np.float64)
    other = check_rotation(k_rot, size, "k_rot").astype(np.float64)
    off = float(np.abs(one @ other.T - np.eye(size)).max())
    if off > TOLERANCE:
        raise BadArgumentError(
            f"k_rot: q_rot @ k_rot^T is off the identity by {off:.3g}, expected the same rotation "
            "of queries and keys"
        )


def rotate(x: np.ndarray, rotation: ArrayLike | None) -> np.ndarray:
    """x @ rotation along the last axis, float32; ``x`` itself without a rotation."""
    return x if rotation is None else x @ np.asarray(rotation, np.float32)
