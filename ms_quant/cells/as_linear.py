"""The record of a quantized linear that a Cell computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ms_quant.cells.quant_linear import QuantLinear
from ms_quant.cells.tree import host_array
from ms_quant.numerics.activation import Activation, StaticActivation
from ms_quant.numerics.float_grid import DualMxGrid, MxGrid
from ms_quant.numerics.grid import AffineGrid, Grid
from ms_quant.numerics.linear import Kronecker, LowRank, QuantizedLinear, smooth_of, with_tensors
from ms_quant.numerics.timestep import StatedTables, TimestepActivation


def as_linear(cell: QuantLinear) -> QuantizedLinear:
    """What a Cell computes, from its parameters.

    The weight scale of a static input is not kept, only its product with the input's: the input's
    is 1 here.
    """
    found = {name: host_array(parameter) for name, parameter in cell.parameters_and_names()}
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
        return replace(grid, scale=scale[:, None] if scale.ndim == 1 else scale)
    if isinstance(grid, MxGrid):
        return replace(grid, exponents=found["weight_exponent"])
    if isinstance(grid, DualMxGrid):
        inner = replace(grid.inner, exponents=found["weight_exponent"])
        return replace(grid, scales=found["weight_dual_scale"], inner=inner)
    return grid  # of a scheme that no flavour of networks stores


def _activation(cell: QuantLinear, found: dict[str, np.ndarray]) -> Activation:
    activation = cell.activation
    if isinstance(activation, StaticActivation):
        return replace(
            activation,
            scale=np.float32(1),
            offset=int(found["input_offset"][0]),
            input_scale=found["input_scale"],
        )
    if isinstance(activation, TimestepActivation):
        tables = StatedTables(found["deq_scale"], found["quant_bias"])
        return TimestepActivation(found["input_scale"][:, 0], found["input_offset"][:, 0], tables)
    return activation
