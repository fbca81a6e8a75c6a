"""The column step against the textbook: after each column the rest is solved again."""

from __future__ import annotations

import numpy as np
import pytest

from ms_quant.algorithms.gptq import BLOCK, damped, inverse_factor, solve_columns


def oracle(weight: np.ndarray, hessian: np.ndarray, step: float) -> np.ndarray:
    """Optimal Brain Quantization in a fixed order: after each column the rest is solved again."""
    weight, rounded = weight.copy(), np.zeros_like(weight)
    for j in range(weight.shape[1]):
        rounded[:, j] = np.rint(weight[:, j] / step) * step
        rest = slice(j + 1, None)
        # the columns after j minimize the error given what has been rounded
        move = np.linalg.solve(hessian[rest, rest], hessian[rest, j])
        weight[:, rest] += np.outer(weight[:, j] - rounded[:, j], move)
    return rounded


def correlated(columns: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3 * columns, columns)) @ rng.normal(size=(columns, columns))
    return x.T @ x / len(x)


@pytest.mark.parametrize("columns", [1, 7, 64, BLOCK + 5])
def test_agrees_with_solving_the_rest_again(columns: int) -> None:
    hessian = damped(correlated(columns, columns))
    weight = np.random.default_rng(1).normal(size=(9, columns))
    step, found = 0.3, np.zeros((9, columns))

    def rounder(j: int, target: np.ndarray) -> np.ndarray:
        found[:, j] = np.rint(target / step) * step
        return found[:, j]

    solve_columns(weight, inverse_factor(hessian), rounder)
    np.testing.assert_array_equal(found, oracle(weight, hessian, step))


@pytest.mark.parametrize("columns", [1, 40, 2 * BLOCK + 3])
def test_the_factor_is_that_of_the_inverse(columns: int) -> None:
    hessian = damped(correlated(columns, 3))
    factor = inverse_factor(hessian)
    assert (np.diagonal(factor) > 0).all() and not np.tril(factor, -1).any()
    np.testing.assert_allclose(factor.T @ factor @ hessian, np.eye(len(hessian)), atol=1e-9)


def test_what_is_left_of_the_error_is_the_sum_over_columns() -> None:
    hessian = damped(correlated(50, 4))
    weight = np.random.default_rng(2).normal(size=(5, 50))
    factor, left = inverse_factor(hessian), np.zeros(5)
    rounded = np.zeros_like(weight)

    def rounder(j: int, target: np.ndarray) -> np.ndarray:
        rounded[:, j] = np.rint(target)
        left[:] += ((target - rounded[:, j]) / factor[j, j]) ** 2
        return rounded[:, j]

    solve_columns(weight, factor, rounder)
    error = weight - rounded
    np.testing.assert_allclose(np.einsum("nk,kl,nl->n", error, hessian, error), left)


def test_channels_that_are_never_used_do_not_matter() -> None:
    dead = np.zeros((6, 6))
    np.testing.assert_array_equal(damped(dead), np.eye(6))
    partly = correlated(6, 5)
    partly[2], partly[:, 2] = 0, 0
    assert np.isfinite(inverse_factor(damped(partly))).all()
    assert damped(np.zeros((0, 0))).shape == (0, 0)
