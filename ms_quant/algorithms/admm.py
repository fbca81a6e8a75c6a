"""Pruning by ADMM, then weights of two mantissa bits: the dense float weights of W16A16S.

The smallest weights of the whole matrix become zero and the others make up for them: W minimises
``tr((W - W0) H (W - W0)^T)`` with a share of it zero, by steps that alternate between least squares
and the zeros, on columns scaled so that all inputs have the same power. Then all weights but a few
lose the lower bits of their mantissas: what is left of a float16 has an empty lower byte, which
compression takes out, as it takes out the zeros.

Source: Boza, arXiv 2401.02938 (its constants: 20 steps, rho 1, damping 0.1); the cut is that of
msModelSlim's ``float_sparse``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import ml_dtypes
import numpy as np
from pydantic import Field

from ms_quant.algorithms.problem import Problem, Solution, checked, grid_of, seen_hessian
from ms_quant.numerics.affine import check_finite

STEPS, CHOOSING_STEPS = 20, 15  # in the last five the zeros stay where they are
PENALTY, DAMPING = 1.0, 0.1
MAX_SPARSITY = 0.7  # beyond it no random weight keeps half of its output
PROTECTED = 0.02  # share of the weights that keep their mantissas
SMALLEST_NORM = 1e-8  # of an input that is always zero
E5M2 = np.dtype(ml_dtypes.float8_e5m2)  # a float16 without its lower byte
LARGEST = float(ml_dtypes.finfo(E5M2).max)


@dataclass(frozen=True)
class AdmmOptions:
    """Attributes:
    sparsity: share of each weight that becomes zero.
    """

    sparsity: Annotated[float, Field(ge=0, le=MAX_SPARSITY)] = 0.3


def pruned(weight: np.ndarray, hessian: np.ndarray, sparsity: float) -> np.ndarray:
    """The weight with ``int(sparsity * size)`` zeros at least, the others changed to make up.

    Args:
        weight: float32 (out, K).
        hessian: float32 (K, K), the mean of x x^T.
        sparsity: in [0, 1).

    Returns:
        float32 (out, K).
    """
    norm = np.sqrt(np.diagonal(hessian).astype(np.float64)) + SMALLEST_NORM
    scaled = hessian / norm / norm[:, None]
    diagonal = np.diag_indices_from(scaled)
    scaled[diagonal] += DAMPING * float(np.mean(scaled[diagonal])) if len(norm) else 0.0
    penalized = scaled.copy()
    penalized[diagonal] += PENALTY
    inverse = np.linalg.inv(penalized).astype(np.float32)
    current = weight * norm.astype(np.float32)
    wanted = current @ scaled.astype(np.float32)
    dual, keep = np.zeros_like(current), np.ones(current.shape, np.bool_)
    for step in range(STEPS):
        moved = current + dual
        if step < CHOOSING_STEPS:
            keep = ~_smallest(np.abs(moved), sparsity)
        projected = moved * keep
        dual += current - projected
        current = (wanted + np.float32(PENALTY) * (projected - dual)) @ inverse
    return (current + dual) * keep / norm.astype(np.float32)


def cut(weight: np.ndarray) -> np.ndarray:
    """The nearest numbers of two mantissa bits, half to even: float16 without the lower byte.

    Below 2**-14 they are multiples of 2**-16, and none is larger than 57,344.

    Args:
        weight: float32.
    """
    return np.clip(weight, -LARGEST, LARGEST).astype(E5M2).astype(np.float32)


def protected(weight: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """bool (out, K): the 2 % of the weights whose cut would change the output most."""
    power = np.sqrt(np.diagonal(hessian))
    return _smallest(-np.abs(weight - cut(weight)) * power, PROTECTED)


def _smallest(values: np.ndarray, share: float) -> np.ndarray:
    """Where the smallest ``int(share * size)`` values are; the earlier one at a tie."""
    order = np.argsort(values, axis=None, kind="stable")
    found = np.zeros(values.size, np.bool_)
    found[order[: int(share * values.size)]] = True
    return found.reshape(values.shape)


def solve(problem: Problem, solution: Solution, options: AdmmOptions) -> Solution:
    hessian, grids, codes = seen_hessian(problem, solution), {}, {}
    check_finite(hessian, f"{problem.name}: Hessian")
    for name, weight in checked(problem, solution).items():
        made = pruned(weight, hessian, options.sparsity)
        grids[name] = grid_of(problem, solution, name, made)
        exact = protected(made, hessian)
        codes[name] = grids[name].round(np.where(exact, made, cut(made)))
    return replace(solution, grids=grids, codes=codes)
