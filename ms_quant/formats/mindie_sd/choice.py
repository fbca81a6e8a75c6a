"""Which type of the mindie-sd format stores a scheme or a linear, and what none of them can."""

from __future__ import annotations

from dataclasses import replace

from ms_quant.errors import BadFileError, MsQuantError, UnsupportedError
from ms_quant.formats.mindie_sd.held import WEIGHT_ONLY
from ms_quant.formats.mindie_sd.types import TYPES
from ms_quant.numerics.activation import (
    Activation,
    Float,
    MxTokens,
    PerToken,
    StaticActivation,
    StaticInt8,
)
from ms_quant.numerics.float_grid import DualMxGrid, MxGrid
from ms_quant.numerics.grid import AffineGrid, Grid
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.minifloat import E2M1
from ms_quant.numerics.mx import BLOCK, DUAL_BLOCK
from ms_quant.numerics.timestep import TimestepActivation
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.storage import ScaleType
from ms_quant.schemes.support import support_of

_SERVED = ", ".join(TYPES)
_PER_CHANNEL_INPUT = (
    "scheme W8A8 has an input scale for each channel and adds the bias in float, MindIE-SD reads "
    "one scale and the bias in quant_bias, expected W8A8_PER_CHANNEL"
)


def type_of_scheme(scheme: Scheme, name: str) -> str:
    """The type under which linears of a scheme are stored.

    Args:
        scheme: as chosen.
        name: of the linear, for the error.

    Raises:
        MsQuantError: the runtime serves none that computes the same; names the scheme.
    """
    activation = scheme.activation
    if isinstance(activation, StaticInt8) and not activation.folds_bias:
        raise BadFileError(f"{name}: {_PER_CHANNEL_INPUT}")
    row = TYPES.get(scheme.name)
    if row is None:
        raise UnsupportedError(
            f"{name}: MindIE-SD serves no scheme {scheme.name}, expected one of {_SERVED}"
        )
    wrong = [key for key, value in row.options if scheme.chosen[key] != value]
    if wrong:
        wanted = " and ".join(f"{key}={value}" for key, value in row.options)
        raise BadFileError(
            f"{name}: {wrong[0]} is {scheme.chosen[wrong[0]]}, MindIE-SD reads scheme "
            f"{scheme.name} only with {wanted}"
        )
    return scheme.name


def network_scheme(scheme: Scheme) -> Scheme:
    """The scheme as linears of a network have it, which only this format stores: inputs are
    rounded as by its operators."""
    if scheme.name in TYPES and isinstance(scheme.activation, MxTokens):
        return replace(scheme, activation=TYPES[scheme.name].make().activation)
    return scheme


def network_scale_type(scheme: Scheme) -> ScaleType:
    """The type of the scales of linears of a network: they are exact in the type that it runs
    in."""
    if scheme.name not in TYPES or isinstance(scheme.activation, StaticInt8):
        rows = support_of(scheme.name)
        return rows[0].scale_type if rows else ScaleType.FLOAT32
    kept = scheme.name in WEIGHT_ONLY  # the loader widens the scales of all others
    return ScaleType.MODEL if kept else ScaleType.WIDENED


def type_of_linear(linear: QuantizedLinear, name: str) -> str:
    """The type under which a linear is stored.

    Raises:
        MsQuantError: the runtime serves none that computes what the linear does; names what it is
            that cannot be held.
    """
    for what, found in (("Kronecker transform", linear.kronecker), ("branch", linear.branch)):
        if found is not None:
            raise BadFileError(f"{name}: has a {what}, MindIE-SD reads none, expected none")
    grid, activation = linear.grid, linear.activation
    if isinstance(grid, AffineGrid):
        return _type_of_integers(grid, activation, name)
    for type in ("W8A8_MXFP8", "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE"):
        if activation == TYPES[type].make().activation and _is_grid_of(grid, type):
            return type
    raise _unserved(grid, activation, name)


def _is_grid_of(grid: Grid, type: str) -> bool:
    if isinstance(grid, DualMxGrid):
        return type == "W4A4_MXFP4_DUALSCALE" and grid.size == DUAL_BLOCK
    four = isinstance(grid, MxGrid) and grid.rule.element is E2M1
    return isinstance(grid, MxGrid) and type == ("W4A4_MXFP4" if four else "W8A8_MXFP8")


def _type_of_integers(grid: AffineGrid, activation: Activation, name: str) -> str:
    if grid.scale.shape[1] != 1 or not grid.format.symmetric:
        found = "weights in groups" if grid.format.symmetric else "asymmetric weights"
        raise BadFileError(
            f"{name}: has {found}, MindIE-SD reads symmetric ones with one scale a row, expected "
            "group_size=0 and symmetric=True"
        )
    bits = grid.format.bits
    if isinstance(activation, Float):
        return f"W{bits}A16"
    if isinstance(activation, PerToken) and activation.clip != 1:
        raise BadFileError(
            f"{name}: has a clip_ratio of {activation.clip:g}, MindIE-SD reads none, expected 1"
        )
    if activation == PerToken(bits):
        return f"W{bits}A{bits}_DYNAMIC"
    if isinstance(activation, TimestepActivation) and bits == 8:
        return "W8A8_TIMESTEP"
    if isinstance(activation, StaticActivation) and bits == 8:
        if not activation.folds_bias:
            raise BadFileError(f"{name}: {_PER_CHANNEL_INPUT}")
        return "W8A8_PER_TENSOR" if grid.format.per_tensor else "W8A8_PER_CHANNEL"
    raise _unserved(grid, activation, name)


def _unserved(grid: Grid, activation: Activation, name: str) -> MsQuantError:
    found = f"a weight on a {_said(grid)} and an input of {_said(activation)}"
    return BadFileError(f"{name}: has {found}, expected one of MindIE-SD's types {_SERVED}")


def _said(record: object) -> str:
    if isinstance(record, AffineGrid):
        return f"grid of int{record.format.bits}"
    if isinstance(record, DualMxGrid):
        return f"DualMxGrid of {record.size}"
    if isinstance(record, PerToken):
        return f"PerToken({record.bits})"
    return type(record).__name__


def check_linear(type: str, shape: tuple[int, int], smooths: bool, bias: bool, name: str) -> None:
    """Refuses a linear that the runtime does not compute as its tensors say.

    Args:
        type: a name from ``TYPES``.
        shape: (out, in).
        smooths: whether it has a smoothing vector.
        bias: whether it has a bias.
        name: its path, for the error.

    Raises:
        MsQuantError: it has what the runtime ignores, or inputs that cannot be packed.
    """
    row = TYPES[type]
    if smooths and not row.smooths:
        raise BadFileError(
            f"{name}: MindIE-SD ignores mul_scale of a {type} linear, expected no smoothing"
        )
    if bias and row.drops_bias:
        raise BadFileError(
            f"{name}: MindIE-SD drops the bias of a {type} linear, expected one without a bias"
        )
    row.make().weight.check_columns(shape[1], f"{name}.weight")


def why_not_run(type: str, shape: tuple[int, int], bias: bool) -> str:
    """Why the runtime fails on a linear that files can hold; "" where it does not.

    Args:
        type: a name from ``TYPES``.
        shape: (out, in).
        bias: whether the model's own linear has a bias; what the file has does not count.
    """
    row = TYPES[type]
    if row.needs_bias and not bias:
        return (
            f"MindIE-SD fails on a {type} linear without a bias in the model itself, zeros in the "
            "file do not help; W8A8_DYNAMIC and W4A4_MXFP4 run without"
        )
    blocks = -(-shape[1] // BLOCK)
    if row.even_blocks and blocks % 2:
        return (
            f"MindIE-SD reads the scales of a {type} linear in pairs, {shape[1]} inputs have "
            f"{blocks} of them; W4A4_MXFP4 takes any number"
        )
    return ""
