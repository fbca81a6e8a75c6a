"""How far outputs are from what they should be."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Errors = tuple[float, float]
"""The relative error in the mean over tokens, and the mean squared error."""
SMALLEST = np.finfo(np.float64).tiny
WORST = 0.02


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


def token_shares(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """float64 (tokens,): squared error over squared output of each token.

    Some tokens have a few activations that are larger than all others together. In a mean of
    squares over tokens they alone would count.

    Args:
        pairs: error and exact output (..., channels) of some tokens at a time.
    """
    shares = [_power(error) / np.maximum(_power(exact), SMALLEST) for error, exact in pairs]
    return np.concatenate([np.zeros(0), *(share.reshape(-1) for share in shares)])


def token_error(shares: np.ndarray) -> float:
    """The mean of :func:`token_shares`, and 0.02 of the largest.

    A mean alone does not see the one token in hundreds that is clipped, while attention reads the
    first token of a text more than any other.
    """
    return float(shares.mean() + WORST * shares.max())


def _power(x: np.ndarray) -> np.ndarray:
    """Squared length of each token, float64."""
    return np.square(x, dtype=np.float64).sum(axis=-1)
