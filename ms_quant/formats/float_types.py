"""The types of what stays float: that of the output, and for routers their own."""

from __future__ import annotations

import numpy as np

from ms_quant.errors import MsQuantError
from ms_quant.files.reader import FloatTensors
from ms_quant.models.block_spec import BlockSpec, LinearSpec, NormSpec
from ms_quant.models.config import ModelConfig
from ms_quant.models.experts import CORRECTION, RouterSpec
from ms_quant.models.names import block_prefix
from ms_quant.numerics.storage import DTYPES
from ms_quant.plan.plan import Plan

FLOAT32 = DTYPES["float32"]


def router_dtype(config: ModelConfig, checkpoint: FloatTensors) -> np.dtype | None:
    """float32 where a checkpoint has a router's weight in it; None where it has the model's type.

    A router that is rounded chooses other experts.
    """
    for block in config.stored_blocks:
        for path, spec in block.linears.items():
            if not isinstance(spec, RouterSpec):
                continue
            try:
                info = checkpoint.info(f"{block_prefix(block.index)}{path}.weight")
            except MsQuantError:
                continue  # a missing tensor is refused where tensors are checked
            if info.dtype == FLOAT32:
                return FLOAT32
    return None


def float_dtype(plan: Plan, spec: LinearSpec | NormSpec, suffix: str) -> np.dtype:
    """The type of a float tensor of a block in a plan's output."""
    if not isinstance(spec, RouterSpec):
        return plan.dtype
    return FLOAT32 if suffix == CORRECTION else plan.router_dtype or plan.dtype


def why_float(block: BlockSpec, path: str) -> str:
    """Why a linear of a block is never quantized."""
    if isinstance(block.linears[path], RouterSpec):
        return "a router that is rounded chooses other experts, and runtimes hold it in float"
    if any(edge.producer == path for edge in block.linear_edges):
        return "runtimes take its float weight apart for attention in the latent space"
    return "runtimes hold it in float"
