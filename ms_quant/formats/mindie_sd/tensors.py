"""The tensors of a quantized linear in the mindie-sd format: type, shape and value of each.

docs/mindie_sd_format.md states them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.formats.ascend.codes import FLOAT4, FLOAT8, INT4, PLAIN, Codes
from ms_quant.formats.ascend.tensors import exponents, widened
from ms_quant.formats.format import Part
from ms_quant.formats.mindie_sd.held import held_dtype
from ms_quant.formats.mindie_sd.types import FLOAT, TYPES
from ms_quant.numerics.activation import StaticInt8
from ms_quant.numerics.float_grid import DualMxFormat, DualMxGrid, MxFormat
from ms_quant.numerics.linear import QuantizedLinear, folded_bias
from ms_quant.numerics.timestep import Timestep, TimestepActivation
from ms_quant.numerics.timestep_linear import timestep_tables

INT32, INT64 = np.dtype(np.int32), np.dtype(np.int64)
FLOAT32, UINT8 = np.dtype(np.float32), np.dtype(np.uint8)
MUL_SCALE, INNER = "div.mul_scale", "linear."
WITH_CODES = frozenset({"weight", "quant_bias", "linear.weight", "linear.quant_bias"})
FLOATS = frozenset({"bias", "linear.bias", MUL_SCALE})


@dataclass(frozen=True)
class Layout:
    """Which tensors a linear has.

    Attributes:
        type: a name from ``mindie_sd_types.TYPES``.
        shape: (out, in).
        dtype: what the model runs in, bfloat16 or float16; float32 where that is not decided.
        smooths: whether there is a smoothing vector.
        bias: whether there is a bias.
        steps: T, for timesteps.
        name: of the linear, for errors.
    """

    type: str
    shape: tuple[int, int]
    dtype: np.dtype
    smooths: bool = False
    bias: bool = False
    steps: int = 0
    name: str = "linear"


def entry(type: str, suffix: str) -> str:
    """What a description says of a tensor of a quantized linear."""
    return FLOAT if suffix in FLOATS else type


def codes_of(type: str) -> Codes:
    """How a type stores its codes: int4 is not packed, the runtime packs it when it loads."""
    weight = TYPES[type].make().weight
    if not weight.integer:
        return FLOAT8 if weight.bits == 8 else FLOAT4
    return PLAIN if weight.bits == 8 else INT4


def parts(layout: Layout) -> dict[str, Part]:
    """Suffix to tensor of a linear, its bias among them."""
    scheme, codes = TYPES[layout.type].make(), codes_of(layout.type)
    rows = layout.shape[:1]
    made = {
        "weight": Part(
            codes.dtype,
            codes.shape(*layout.shape),
            lambda x: codes.pack(x.weight, f"{layout.name}.weight"),
        )
    }
    if isinstance(scheme.activation, StaticInt8):
        made |= _static(layout)
    elif isinstance(scheme.activation, Timestep):
        made |= _timesteps(layout)
    if not isinstance(scheme.activation, StaticInt8):
        made |= _scales(layout)
    if layout.bias or TYPES[layout.type].needs_bias:
        made["bias"] = _part(layout, "bias", rows, lambda x: _bias(x, rows))
    if not layout.smooths:
        return made
    columns = layout.shape[1:]
    smoothing = _part(layout, "mul_scale", columns, lambda x: _mul_scale(x, columns[0]))
    return {MUL_SCALE: smoothing, **{f"{INNER}{suffix}": part for suffix, part in made.items()}}


def _part(
    layout: Layout, suffix: str, shape: tuple[int, ...], make: Callable[[QuantizedLinear], Any]
) -> Part:
    """A float tensor in the type that the runtime holds it in."""
    dtype = held_dtype(layout.type, suffix, layout.dtype)
    return Part(dtype, shape, lambda x: exact(make(x), dtype, f"{layout.name}.{suffix}"))


def _static(layout: Layout) -> dict[str, Part]:
    rows, deq = layout.shape[:1], _deq_type(layout)
    return {
        "input_scale": _part(layout, "input_scale", (1,), lambda x: x.static.input_scale[:1]),
        "input_offset": Part(FLOAT32, (1,), lambda x: np.array([x.static.offset], FLOAT32)),
        "deq_scale": Part(deq, rows, lambda x: _stored_deq(x.deq_scale, deq)),
        "quant_bias": Part(INT32, rows, lambda x: folded_bias(x, layout.name)),
    }


def _timesteps(layout: Layout) -> dict[str, Part]:
    steps, table, deq = (layout.steps, 1), (layout.steps, layout.shape[0]), _deq_type(layout)
    return {
        "input_scale": _part(layout, "input_scale", steps, lambda x: _steps(x).scale[:, None]),
        "input_offset": Part(FLOAT32, steps, lambda x: _steps(x).offset[:, None].astype(FLOAT32)),
        "deq_scale": Part(
            deq, table, lambda x: _stored_deq(timestep_tables(x, layout.name)[0], deq)
        ),
        "quant_bias": Part(INT32, table, lambda x: timestep_tables(x, layout.name)[1]),
    }


def _steps(linear: QuantizedLinear) -> TimestepActivation:
    assert isinstance(linear.activation, TimestepActivation)
    return linear.activation


def _deq_type(layout: Layout) -> np.dtype:
    """The operator of float16 models takes the bits as integers, msModelSlim writes none."""
    return INT64 if layout.dtype.name == "float16" else FLOAT32


def _stored_deq(scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return widened(scale) if dtype == INT64 else scale


def _scales(layout: Layout) -> dict[str, Part]:
    scheme, (rows, columns) = TYPES[layout.type].make(), layout.shape
    format = scheme.weight
    if isinstance(format, MxFormat | DualMxFormat):
        blocks = (rows, -(-columns // format.group_size))
        made = {"weight_scale": Part(UINT8, blocks, lambda x: exponents(x.grid))}
        if isinstance(format, DualMxFormat):
            long = (rows, -(-columns // format.dual_block_size), 1)
            made["weight_dual_scale"] = Part(FLOAT32, long, _dual_scale)
        return made
    scale = _part(layout, "weight_scale", (rows, 1), lambda x: x.weight_scale[:, None])
    return {"weight_scale": scale}


def _dual_scale(linear: QuantizedLinear) -> np.ndarray:
    assert isinstance(linear.grid, DualMxGrid)
    return linear.grid.scales[..., None]


def _bias(linear: QuantizedLinear, shape: tuple[int, ...]) -> np.ndarray:
    """Zeros where there is none: the runtime asks a bias for its type and fails on None."""
    if linear.bias is None:
        return np.zeros(shape, FLOAT32)
    return linear.bias.astype(FLOAT32)


def _mul_scale(linear: QuantizedLinear, columns: int) -> np.ndarray:
    return np.ones(columns, FLOAT32) if linear.mul_scale is None else linear.mul_scale


def exact(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The array in a type that holds its values.

    Raises:
        MsQuantError: the type does not hold all of them.
    """
    with np.errstate(over="ignore"):
        stored = array.astype(dtype)
    wrong = int(np.count_nonzero(stored.astype(np.float32) != array))
    if wrong:
        raise BadFileError(
            f"{name}: {wrong} of {array.size} values are not exact in {dtype.name}, in which "
            f"MindIE-SD holds them, expected some that are made for it: ms_quant.quantize(network, "
            f"..., dtype={dtype.name!r}) makes them"
        )
    return stored
