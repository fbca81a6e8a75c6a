"""Folding a smoothing vector into what makes an input, and the columns of what stays float.

The vector of an input that experts read is decided and folded here without their weights: what is
asked of them is the largest magnitude of each column, so they can come one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ms_quant.algorithms.problem import InputMaxima, Solution
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.edge import Edge
from ms_quant.numerics.folding import divided_gain, divided_rows, exact_columns, powers_of_two
from ms_quant.plan.folding import float_readers, quantized_readers
from ms_quant.plan.plan import Plan
from ms_quant.progress import PartProgress, silent
from ms_quant.statistics.activation_range import MARGIN

Get = Callable[[str], np.ndarray | None]
"""A float32 parameter by its name in the block, or None when there is none of that name."""


class Folded(NamedTuple):
    """Attributes:
    solution: its vector is what the columns of all that read the input are multiplied by.
    floats: float32 tensors that have changed, by their names in the block.
    """

    solution: Solution
    floats: dict[str, np.ndarray]


def fold_for_experts(
    plan: Plan, index: int, edge: Edge, maxima: Callable[[], InputMaxima], get: Get
) -> Folded:
    """Decides and folds the smoothing of an input that experts read.

    Args:
        plan: what to do.
        index: the block.
        edge: of the norm that makes the input.
        maxima: gives what is known of the input; not asked where no algorithm can make use of it.
        get: gives the norm's gain and the weights of what stays float.
    """
    spec = plan.config.block(index)
    groups = [spec.group(name) for name in quantized_readers(plan, index, edge)]
    first = next(layer for group in groups if (layer := plan.layer(index, group)).folds)
    if not first.algorithms.any("of_maxima"):
        return Folded(Solution(), {})
    known, names = maxima(), [member for group in groups for member in group.members]
    solution = first.algorithms.of_maxima(names, known)
    if solution.smooth is None:
        return Folded(solution, {})
    smooth = solution.smooth
    if plan.dtype.name == "float16":
        smooth = np.maximum(smooth, known.activations / np.float32(MARGIN))
    smooth, floats = fold(plan, index, edge, smooth, get)
    return Folded(replace(solution, smooth=smooth), floats)


def with_weights(
    plan: Plan,
    index: int,
    edge: Edge,
    activations: np.ndarray,
    weight: Callable[[str, LinearGroup], np.ndarray],
    progress: PartProgress = silent,
) -> InputMaxima:
    """What is known of an input that experts read, from one weight after the other.

    Args:
        plan: what is quantized.
        index: the block.
        edge: of the norm that makes the input.
        activations: float32 (in,), the largest magnitude of each channel over all tokens.
        weight: gives float32 (out, in) by the path of a linear and its group.
        progress: told how much is done, 0 to 1.
    """
    maxima = InputMaxima(activations, np.zeros_like(activations))
    names = quantized_readers(plan, index, edge)
    for done, name in enumerate(names, 1):
        group = plan.config.block(index).group(name)
        for member in group.members:
            maxima = maxima.with_weight(weight(member, group))
        progress(done / len(names))
    return maxima


def fold(
    plan: Plan, index: int, edge: Edge, smooth: np.ndarray, get: Get
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Divides what makes an input by a vector, and multiplies the columns of what stays float.

    The rows of a quantized linear are divided when it is rounded, not here.

    Args:
        plan: what is quantized.
        index: the block.
        edge: of what makes the input.
        smooth: float32 (in,).
        get: gives the float tensors that change.

    Returns:
        float32 (in,), the vector as what is stored has it, and float32 tensors that have changed,
        by their names in the block.
    """
    dtype, exact = plan.dtype, bool(edge.floats)
    if exact:
        smooth = powers_of_two(smooth)
        for path in edge.floats:
            columns = exact_columns(_found(get, f"{path}.weight"), smooth, dtype)
            smooth = np.where(columns, smooth, np.float32(1))
    floats: dict[str, np.ndarray] = {}
    name = f"{edge.producer}.weight"
    if edge.norm:
        floats[name], smooth = divided_gain(_found(get, name), smooth, dtype, exact)
    elif plan.config.block(index).group_of(edge.producer) is None:
        floats[name], rows = divided_rows(_found(get, name), edge.rows(smooth), dtype)
        smooth = edge.columns(rows)
        bias = get(f"{edge.producer}.bias")
        if bias is not None:
            floats[f"{edge.producer}.bias"] = bias / rows
    for path in float_readers(plan, index, edge):
        floats[f"{path}.weight"] = _found(get, f"{path}.weight") * smooth
    return smooth, floats


def _found(get: Get, name: str) -> np.ndarray:
    array = get(name)
    assert array is not None, name
    return array
