"""How far outputs are from what they should be."""

from __future__ import annotations

import numpy as np

Errors = tuple[float, float]
"""The relative error in the mean over tokens, and the mean squared error."""
SMALLEST = np.finfo(np.float64).tiny


def errors(made: np.ndarray, exact: np.ndarray) -> Errors:
    """How far (..., channels) is from what it should be.

    A mean of squares counts a handful of tokens with massive activations alone; the relative error
    is that of each token, its squared error over its squared length.
    """
    wide = exact.astype(np.float64)
    squares = np.square(made - wide).sum(axis=-1)
    powers = np.square(wide).sum(axis=-1)
    if not squares.size:
        return 0.0, 0.0
    powers = np.where(powers > 0, powers, np.maximum(squares, SMALLEST))  # of zeros: all or none
    return float((squares / powers).mean()), float(squares.sum() / wide.size)
