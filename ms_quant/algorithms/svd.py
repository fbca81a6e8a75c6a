"""A float branch of low rank takes the weight's largest singular values; the rest is quantized.

W = l2 @ l1 + R with l1 = V^T (rank, in) and l2 = U S (out, rank). Both are rounded to the type in
which they are stored before R is taken, so that what rounding loses is quantized, too. It needs no
calibration; smoothing first moves what is hard in the input into the branch.

Source: SVDQuant (Li et al., arXiv 2411.05007); the randomised range finder is that of Halko et al.,
arXiv 0909.4061, with two power iterations, as in msModelSlim's ``svd_res``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from ms_quant.algorithms.problem import Problem, Solution, checked
from ms_quant.numerics.linear import LowRank

OVERSAMPLING, POWER_ITERATIONS, SEED = 8, 2, 0


@dataclass(frozen=True)
class SvdOptions:
    """Attributes:
    rank: of the branch.
    """

    rank: Annotated[int, Field(ge=1, le=1024)] = 32


def low_rank(weight: np.ndarray, rank: int, dtype: np.dtype) -> LowRank:
    """The branch of a weight.

    Args:
        weight: float32 (out, in).
        rank: at most this one; the rank of the weight's shape if that is smaller.
        dtype: in which both factors are stored.
    """
    rank = min(rank, *weight.shape)
    wide = weight.astype(np.float64)
    width = min(rank + OVERSAMPLING, *weight.shape)
    basis = wide @ np.random.default_rng(SEED).standard_normal((weight.shape[1], width))
    for _ in range(POWER_ITERATIONS):
        basis = np.linalg.qr(basis)[0]
        basis = wide @ np.linalg.qr(wide.T @ basis)[0]
    basis = np.linalg.qr(basis)[0]
    left, values, right = np.linalg.svd(basis.T @ wide, full_matrices=False)
    l1, l2 = right[:rank], (basis @ left[:, :rank]) * values[:rank]
    return LowRank(*(np.ascontiguousarray(m, dtype).astype(np.float32) for m in (l1, l2)))


def solve(problem: Problem, solution: Solution, options: SvdOptions) -> Solution:
    branch = {
        name: low_rank(weight, options.rank, problem.dtype)
        for name, weight in checked(problem, solution).items()
    }
    return replace(solution, branch=branch, clip={})  # factors of another weight's range
