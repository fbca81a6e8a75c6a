"""Importance pruning: which weights of a linear become zero.

Unstructured: the exact number of weights with the lowest importance in the whole tensor, before
rounding to int8. Importance is |W| (magnitude) or |W| * ||X|| with the L2 norm of each input
channel over the calibration tokens (activation).

Source: Sun et al., arXiv 2306.11695, equation 1; compared over the tensor, not over each row.
"""

from __future__ import annotations

from decimal import Decimal
from typing import NamedTuple

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.quantization.hooks import WeightTransform
from ms_quant.statistics.observers import ActivationStats

PRUNINGS = ("activation", "magnitude")
SPARSITY = 0.5


class Pruning(NamedTuple):
    """Attributes:
    share: of the weights of each linear, 0 to below 1.
    kind: one of PRUNINGS.
    """

    share: float
    kind: str


def check_pruning(sparsity: float, pruning: str) -> None:
    """Refuses what is not a share of weights or not a kind of importance.

    Raises:
        MsQuantError: an argument is out of its range.
    """
    if not 0.0 <= sparsity < 1.0:
        raise BadArgumentError(f"sparsity is {sparsity}, expected a number from 0 up to but not 1")
    if pruning not in PRUNINGS:
        raise BadArgumentError(
            f"pruning {pruning!r} is unknown, expected one of {', '.join(PRUNINGS)}"
        )


def pruned_count(sparsity: float, size: int) -> int:
    """floor(sparsity * size), of the decimal number that the user wrote.

    Args:
        sparsity: share of weights to prune; 0.29 of 100 weights is 29, though the nearest binary
            fraction is below 0.29.
        size: how many weights there are.
    """
    return int(Decimal(repr(float(sparsity))) * size)


def importance(weight: np.ndarray, l2_norm: np.ndarray | None) -> np.ndarray:
    """How much each weight matters.

    Args:
        weight: float32 (out, in).
        l2_norm: float32 (in,), norm of each input channel, or None for the magnitude alone.

    Returns:
        float32 (out, in), at least 0; the product is rounded to float32.
    """
    magnitude = np.abs(weight)
    if l2_norm is not None:
        with np.errstate(over="ignore", under="ignore"):
            magnitude *= l2_norm.astype(np.float32, copy=False)
    return magnitude


def prune(weight: np.ndarray, sparsity: float, l2_norm: np.ndarray | None = None) -> np.ndarray:
    """Sets the least important weights to zero.

    Args:
        weight: float32 (out, in), finite.
        sparsity: share of weights, 0 to below 1.
        l2_norm: float32 (in,), or None for magnitude pruning.

    Returns:
        float32 (out, in), a copy. Exactly floor(sparsity * size) positions were chosen, lowest
        importance first, of equal ones the lowest flat index first. Zeros that the weight had
        count among them where they are chosen.
    """
    pruned = weight.copy()
    count = pruned_count(sparsity, weight.size)
    if count:
        score = importance(weight, l2_norm).reshape(-1)
        limit = np.partition(score, count - 1)[count - 1]
        below = score < limit
        ties = np.flatnonzero(score == limit)[: count - int(np.count_nonzero(below))]
        flat = pruned.reshape(-1)
        flat[below] = 0
        flat[ties] = 0
    return pruned


def pruning_transform(sparsity: float, pruning: str) -> WeightTransform:
    """The pruning as a step of the block-by-block driver.

    Args:
        sparsity: share of weights of each linear.
        pruning: ``"activation"`` or ``"magnitude"``.

    Raises:
        MsQuantError: an argument is out of its range.
    """
    check_pruning(sparsity, pruning)

    def transform(path: str, weight: np.ndarray, stats: ActivationStats | None) -> np.ndarray:
        if pruning == "magnitude":
            return prune(weight, sparsity)
        assert stats is not None
        return prune(weight, sparsity, stats.l2_norm)

    return transform
