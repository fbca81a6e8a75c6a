"""GPTQ's column step: each column's rounding error is made up for by the columns after it.

The error of a linear is ``tr((W - Q) H (W - Q)^T)`` with H the mean of x x^T over the calibration
tokens. Once a column is rounded, the best change of those that follow is a multiple of a row of U,
the upper triangular factor of H^-1 = U^T U. What is left of the error is
``sum over columns of ((target - rounded) / U_jj)^2``, with the target the column as the columns
before it have changed it.

Source: Frantar et al., arXiv 2210.17323, section 3.3; the factor is made without inverting H.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

DAMPING = 0.01
BLOCK = 128

Rounder = Callable[[int, np.ndarray], np.ndarray]
"""Called with a column's index and its target (out,); returns the rounded values (out,)."""


def damped(hessian: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """H with ``damping`` times the mean of its diagonal added to the diagonal.

    Args:
        hessian: (K, K), symmetric and positive semidefinite.
        damping: at least 0.

    Returns:
        float64 (K, K), positive definite; the identity where H is all zeros.
    """
    result = hessian.astype(np.float64)
    mean = float(np.mean(np.diagonal(result))) if len(result) else 0.0
    result[np.diag_indices_from(result)] += damping * mean if mean > 0 else 1.0
    return result


def inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """U, upper triangular with a positive diagonal, such that H^-1 = U^T U.

    H = R R^T with R upper triangular is the Cholesky factorization of H read backwards, and
    U = R^-1.

    Args:
        hessian: float64 (K, K), positive definite; see :func:`damped`.
    """
    backwards = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    return _invert(np.ascontiguousarray(backwards))  # BLAS takes no negative strides


def _invert(upper: np.ndarray) -> np.ndarray:
    """The inverse of an upper triangular matrix, half by half; NumPy has only the general one."""
    size, half = len(upper), len(upper) // 2
    if size <= BLOCK:
        return np.triu(np.linalg.inv(upper))
    result = np.zeros_like(upper)
    result[:half, :half] = _invert(upper[:half, :half])
    result[half:, half:] = _invert(upper[half:, half:])
    result[:half, half:] = -result[:half, :half] @ upper[:half, half:] @ result[half:, half:]
    return result


def solve_columns(weight: np.ndarray, factor: np.ndarray, rounder: Rounder) -> None:
    """Rounds the columns of a weight in their order.

    Args:
        weight: (out, K).
        factor: U of :func:`inverse_factor`, of the weight's type.
        rounder: rounds one column; what it returns is the only result.
    """
    weight = weight.copy()
    columns = weight.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block = np.asfortranarray(weight[:, start:stop])
        errors = np.empty_like(block)  # column by column in memory, too
        for j in range(start, stop):
            done = j - start
            target = block[:, done] - errors[:, :done] @ factor[start:j, j]
            errors[:, done] = (target - rounder(j, target)) / factor[j, j]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
