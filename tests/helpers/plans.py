"""Parts of plans, as checkpoint formats are given them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ms_quant.models.block_spec import LinearGroup, LinearSpec
from ms_quant.models.names import parse_linear
from ms_quant.numerics.storage import DTYPES
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.storage import ScaleType, SmoothingTarget
from ms_quant.schemes.support import store, support_of
from ms_quant.schemes.table import get_scheme


def spec_of(plan: Plan, path: str) -> LinearSpec:
    """The linear at a path."""
    block, member, _ = parse_linear(path)
    return plan.config.block(block).linears[member]


def group_of(plan: Plan, path: str) -> LinearGroup:
    """The group that a linear is in."""
    block, member, _ = parse_linear(path)
    group = plan.config.block(block).group_of(member)
    assert group is not None, path
    return group


def given(plan: Plan, path: str) -> tuple[LayerPlan, LinearGroup, LinearSpec]:
    """What the functions of a checkpoint format are given of a quantized linear."""
    return plan.quantized_layer(path), group_of(plan, path), spec_of(plan, path)


def with_layer(plan: Plan, layer: LayerPlan) -> Plan:
    """A plan whose groups all become of one kind."""
    return replace(plan, layers=dict.fromkeys(plan.layers, layer))


def held(
    name: str,
    format: str,
    target: SmoothingTarget | None = None,
    dtype: np.dtype = DTYPES["bfloat16"],
    **options: Any,
) -> Scheme:
    """A scheme as a format holds it."""
    return store(get_scheme(name, **options), dtype, format, target)[0]


def usual(name: str, **options: Any) -> tuple[Scheme, ScaleType]:
    """A scheme, and the type of its scales in its default format."""
    rows = support_of(name)  # there is none for networks
    return get_scheme(name, **options), rows[0].scale_type if rows else ScaleType.FLOAT32
