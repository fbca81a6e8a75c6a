"""GPTQ's column step: each column's rounding error is made up for by the columns after it.

The error of a linear is ``tr((W - Q) H (W - Q)^T)`` with H the mean of x x^T over the calibration
tokens, each divided by its length, and shrunk to its diagonal. Once a column is rounded, the best
change of those that follow is a multiple of a row of U, the upper triangular factor of
H^-1 = U^T U. What is left of the error is ``sum over columns of ((target - rounded) / U_jj)^2``,
with the target the column as the columns before it have changed it.

Source: Frantar et al., arXiv 2210.17323, section 3.3; the factor is made without inverting H.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from ms_quant.algorithms.problem import Problem, Solution, checked, grid_of, noted, seen_hessian
from ms_quant.errors import BadArgumentError, UnsupportedError
from ms_quant.numerics.affine import check_finite
from ms_quant.numerics.grid import Grid

DAMPING = 0.01
TOKENS_A_CHANNEL = 4
BLOCK = 128
RETRIES = 4

Rounder = Callable[[int, np.ndarray], np.ndarray]
"""Called with a column's index and its target (out,); returns the rounded values (out,)."""

Refit = Callable[[int, np.ndarray], None]
"""Called before a group's first column with its index and the group's targets (out, group)."""


@dataclass(frozen=True)
class GptqOptions:
    """Attributes:
    damping: share of the mean of the Hessian's diagonal that is added to it.
    shrinkage: share that is taken off what is beside the Hessian's diagonal; None is what the
        number of calibration tokens asks for.
    act_order: round the columns with the largest inputs first.
    static_groups: take a group's scale from the weight as it was, not as the columns before it
        have changed it. The formats hold no order of columns, so act_order needs it per group.
    """

    damping: Annotated[float, Field(gt=0, le=1)] = DAMPING
    shrinkage: Annotated[float, Field(ge=0, le=1)] | None = None
    act_order: bool = False
    static_groups: bool = False


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


def shrunk(hessian: np.ndarray, share: float) -> np.ndarray:
    """H with a share of what is beside its diagonal taken off; 1 leaves the diagonal.

    Args:
        hessian: float32 (K, K), which is changed.
        share: 0 to 1.
    """
    diagonal = np.diagonal(hessian).copy()
    hessian *= np.float32(1 - share)
    hessian[np.diag_indices_from(hessian)] = diagonal
    return hessian


def shrinkage(channels: int, tokens: int) -> float:
    """The share for a Hessian of so many channels that so many tokens have shown.

    A few thousand tokens say how large each channel is, but not how thousands of channels go
    together: what a column makes up for on these tokens is an error on others.
    """
    doubt = TOKENS_A_CHANNEL * channels
    return doubt / max(1, doubt + tokens)


def inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """U, upper triangular with a positive diagonal, such that H^-1 = U^T U.

    H = R R^T with R upper triangular is the Cholesky factorization of H read backwards, and
    U = R^-1.

    Args:
        hessian: float64 (K, K), positive definite; see :func:`damped`.
    """
    lower = np.linalg.cholesky(hessian[::-1, ::-1])
    del hessian  # which nobody else holds: each of these is large
    upper = np.ascontiguousarray(lower[::-1, ::-1])  # BLAS takes no negative strides
    del lower
    return _invert(upper)


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


def solve_columns(
    weight: np.ndarray,
    factor: np.ndarray,
    rounder: Rounder,
    group: int = 0,
    refit: Refit | None = None,
) -> None:
    """Rounds the columns of a weight in their order.

    Args:
        weight: (out, K).
        factor: U of :func:`inverse_factor`, of the weight's type.
        rounder: rounds one column; what it returns is the only result.
        group: columns of a group, a divisor or a multiple of 128.
        refit: told the targets of each group before its first column.
    """
    weight = weight.copy()
    columns = weight.shape[1]
    size = max(BLOCK, group) if refit else BLOCK
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        block = np.asfortranarray(weight[:, start:stop])
        errors = np.empty_like(block)  # column by column in memory, too
        for j in range(start, stop):
            done = j - start
            if refit and done % group == 0:
                ahead = slice(done, done + group)
                refit(j, block[:, ahead] - errors[:, :done] @ factor[start:j, start:stop][:, ahead])
            target = block[:, done] - errors[:, :done] @ factor[start:j, j]
            errors[:, done] = (target - rounder(j, target)) / factor[j, j]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]


def factor_with_retry(hessian: np.ndarray, damping: float, name: str) -> tuple[np.ndarray, float]:
    """:func:`inverse_factor` of the damped H, with ten times the damping where that fails.

    Args:
        hessian: (K, K), symmetric.
        damping: what is tried first.
        name: of the linears, for the error.

    Returns:
        float64 (K, K), and the damping that was used.
    """
    check_finite(hessian, f"{name}: Hessian")
    for attempt in range(RETRIES):
        tried = damping * 10**attempt
        try:
            return inverse_factor(damped(hessian, tried)), tried
        except np.linalg.LinAlgError:
            continue
    raise BadArgumentError(
        f"{name}: the Hessian of {len(hessian)} inputs is not positive definite with damping "
        f"{tried:g}"
    )


def round_weight(
    weight: np.ndarray, grid: Grid, factor: np.ndarray, order: np.ndarray, refit: bool
) -> np.ndarray:
    """The codes of a weight on a grid, column by column.

    Args:
        weight: float32 (out, K).
        grid: fitted to the weight; its groups change in place with ``refit``.
        factor: U of the Hessian whose rows and columns are in ``order``.
        order: the columns in the order in which they are rounded.
        refit: take each group's parameters anew before its first column; needs the columns' own
            order.
    """
    codes = grid.round(weight)

    def rounder(j: int, target: np.ndarray) -> np.ndarray:
        column = int(order[j])  # parameters are those of the column's own place
        codes[:, column : column + 1] = grid.round(target[:, None], column)
        return grid.values(codes[:, column : column + 1], column)[:, 0]

    def begin(j: int, targets: np.ndarray) -> None:
        grid.refit(np.ascontiguousarray(targets), j)

    narrow = factor.astype(np.float32)
    solve_columns(weight[:, order], narrow, rounder, grid.group, begin if refit else None)
    return codes


def solve(problem: Problem, solution: Solution, options: GptqOptions) -> Solution:
    hessian, share = seen_hessian(problem, solution), options.shrinkage
    share = shrinkage(len(hessian), problem.seen.tokens) if share is None else share
    hessian = shrunk(hessian, share)
    order = np.arange(len(hessian))
    if options.act_order:
        order = np.argsort(-np.diagonal(hessian), kind="stable")
        hessian = hessian[np.ix_(order, order)]
    factor, damping = factor_with_retry(hessian, options.damping, problem.name)
    del hessian
    grids, codes = {}, {}
    for name, weight in checked(problem, solution).items():
        grid = grid_of(problem, solution, name, weight)
        chosen = name in solution.grids or name in solution.clip
        grouped = grid.group < weight.shape[1]
        if options.act_order and grouped and not (options.static_groups or chosen):
            raise UnsupportedError(
                f"{problem.name}: act_order with groups of {grid.group} needs static_groups, as "
                "no checkpoint here holds the order of the columns"
            )
        refit = grouped and not options.static_groups and not chosen
        codes[name] = round_weight(weight, grid, factor, order, refit)
        grids[name] = grid
    solution = replace(solution, grids=grids, codes=codes)
    return solution if damping == options.damping else noted(solution, damping=damping)
