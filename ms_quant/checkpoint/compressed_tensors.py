"""The compressed-tensors flavour, as vLLM reads it and LLM Compressor writes it.

docs/compressed_tensors_format.md states what its files hold. Its description is the entry
``quantization_config`` of config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ms_quant.checkpoint.compressed_tensors_config import (
    NAME,
    PACKED,
    format_of,
    quantization_config,
    read_options,
)
from ms_quant.checkpoint.compressed_tensors_tensors import WITH_CODES, parts, read_linear
from ms_quant.checkpoint.flavour import Flavour, Tensors
from ms_quant.checkpoint.writer import INDEX_NAME, TensorPlan
from ms_quant.errors import MsQuantError
from ms_quant.models.families import LinearGroup
from ms_quant.numerics.grid import AffineFormat
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.pack import WORD_BITS

if TYPE_CHECKING:
    from ms_quant.checkpoint.reader import Checkpoint
    from ms_quant.plan import Plan

STORED = frozenset(
    {"weight_scale", "weight_zero_point", "act_scale", "input_scale", "input_offset"}
)


def check(plan: Plan, group: LinearGroup, shape: tuple[int, int], name: str) -> None:
    """Refuses a linear that cannot be stored.

    Raises:
        MsQuantError: no format holds the scheme, or the shape does not fill words; names the
            weight.
    """
    weight = plan.scheme.weight
    if format_of(plan.scheme) != PACKED:
        return
    assert isinstance(weight, AffineFormat)
    multiple, (rows, columns) = WORD_BITS // weight.bits, shape
    if columns % multiple:
        raise MsQuantError(
            f"{name}: {columns} inputs, expected a multiple of {multiple} to pack codes of "
            f"{weight.bits} bits in words"
        )
    if rows % multiple and not weight.symmetric:
        raise MsQuantError(
            f"{name}: {rows} outputs, expected a multiple of {multiple} to pack zero points of "
            f"{weight.bits} bits in words"
        )


def linear_plan(plan: Plan, group: LinearGroup, shape: tuple[int, int]) -> Tensors:
    return {key: (part.dtype, part.shape) for key, part in parts(plan, shape).items()}


def linear_tensor(
    plan: Plan, group: LinearGroup, linear: QuantizedLinear, suffix: str
) -> np.ndarray:
    """One tensor of a quantized linear, as stored.

    Raises:
        MsQuantError: the linear has what no tensor holds.
    """
    homeless = linear.arrays().keys() - STORED - {"weight"}
    if homeless:
        raise MsQuantError(f"the {NAME} flavour has no place for {min(homeless)} of a linear")
    rows, columns = linear.weight.shape
    return parts(plan, (rows, columns))[suffix].make(linear)


def describe(plan: Plan, tensors: Sequence[TensorPlan]) -> dict[str, Any]:
    """``quantization_config`` of a plan with one scheme."""
    return quantization_config([(plan.scheme, plan.quantized())], plan.float_linears())


def scheme_options(description: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    return read_options(description)


FLAVOUR = Flavour(
    name=NAME,
    document="config.json",
    shard_prefix="model",
    index=INDEX_NAME,
    linear_plan=linear_plan,
    linear_tensor=linear_tensor,
    read_linear=read_linear,
    describe=describe,
    scheme_options=scheme_options,
    check=check,
    with_codes=WITH_CODES,
)
