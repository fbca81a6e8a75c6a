"""The record of a quantized linear that a Cell computes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ms_quant.cells.tree import host_array
from ms_quant.numerics.activation import (
    Activation,
    PerToken,
    PhasedActivation,
    StaticActivation,
)
from ms_quant.numerics.float8_blocks import Float8BlockGrid
from ms_quant.numerics.float_grid import DualMxGrid, Float8Grid, MxGrid
from ms_quant.numerics.grid import AffineGrid, Grid, TwoLevelGrid
from ms_quant.numerics.linear import Kronecker, LowRank, QuantizedLinear, smooth_of, with_tensors
from ms_quant.numerics.timestep import StatedTables, TimestepActivation

if TYPE_CHECKING:
    from ms_quant.cells.quant_linear import QuantLinear


def as_linear(cell: QuantLinear) -> QuantizedLinear:
    """What a Cell computes, from its parameters.

    The weight scale of a static input is not kept, only its product with the input's: the input's
    is 1 here.
    """
    found = {name: host_array(parameter) for name, parameter in cell.kept.items()}
    linear = QuantizedLinear(
        found["weight"],
        _grid(cell, found),
        found.get("bias"),
        _activation(cell, found),
        smooth_of(found["mul_scale"], cell.input_dtype) if "mul_scale" in found else None,
        Kronecker(found["left_trans"], found["right_trans"]) if "left_trans" in found else None,
        LowRank(found["svd_lowrank_l1"], found["svd_lowrank_l2"]) if cell.has_branch else None,
        cell.input_dtype,
    )
    if isinstance(cell.activation, StaticActivation) and cell.activation.folds_bias:
        return with_tensors(linear, found["deq_scale"], found["quant_bias"])
    return linear


def _grid(cell: QuantLinear, found: dict[str, np.ndarray]) -> Grid:
    grid = cell.grid
    if isinstance(grid, AffineGrid):
        scale = found["deq_scale" if cell.static else "weight_scale"]
        zero_point = found.get("weight_zero_point", grid.zero_point)
        wide = scale[:, None] if scale.ndim == 1 else scale
        return replace(grid, scale=wide, zero_point=zero_point)
    if isinstance(grid, TwoLevelGrid):
        second = replace(grid.second, scale=found["weight_scale_second"])
        return replace(grid, scale=found["weight_scale"], second=second)
    if isinstance(grid, Float8Grid | Float8BlockGrid):
        return replace(grid, scale=found["weight_scale"])
    if isinstance(grid, MxGrid):
        return replace(grid, exponents=found["weight_exponent"])
    if isinstance(grid, DualMxGrid):
        inner = replace(grid.inner, exponents=found["weight_exponent"])
        return replace(grid, scales=found["weight_dual_scale"], inner=inner)
    return grid  # of floats


def activation_of(cell: QuantLinear) -> Activation:
    """How a Cell quantizes its input, from its parameters."""
    return _activation(cell, {name: host_array(parameter) for name, parameter in cell.kept.items()})


def _activation(cell: QuantLinear, found: dict[str, np.ndarray]) -> Activation:
    activation = cell.activation
    if isinstance(activation, StaticActivation):
        return _static(activation, np.float32(1), found)
    if isinstance(activation, PhasedActivation):
        scale = found["deq_scale"][0] / found["weight_scale"][0]  # or a neighbour of it
        return replace(activation, static=_static(activation.static, scale, found))
    if isinstance(activation, PerToken) and "clip_ratio" in found:
        return replace(activation, clip=float(found["clip_ratio"][0]))
    if isinstance(activation, TimestepActivation):
        tables = StatedTables(found["deq_scale"], found["quant_bias"])
        return TimestepActivation(found["input_scale"][:, 0], found["input_offset"][:, 0], tables)
    return activation


def _static(
    activation: StaticActivation, scale: np.float32, found: dict[str, np.ndarray]
) -> StaticActivation:
    offset = int(found["input_offset"][0])
    return replace(activation, scale=scale, offset=offset, input_scale=found["input_scale"])
