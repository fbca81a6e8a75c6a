"""What a layout takes on disk, and which linears a target does not compress."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ms_quant.models.config import ModelConfig
from sparse_compress.codec.fractal import unsupported_reason
from sparse_compress.layouts import Layout, Target, TensorSpec
from sparse_compress.layouts.partition import fused_shape


def most_bytes(layout: Layout) -> int:
    """Bytes of the tensors of all ranks, if no tile were smaller than its content."""
    return layout.tp * _sizes(layout.tensors().values())


def staging_bytes(layout: Layout) -> int:
    """Bytes of the blocks that are kept beside the output until a rank's only file is whole."""
    if not layout.target.one_file:
        return 0
    blocks = range(layout.config.num_layers)
    return sum(_sizes(layout.block_tensors(index).values()) for index in blocks)


def _sizes(specs: Iterable[TensorSpec]) -> int:
    return sum(
        (spec.most if spec.shape is None else math.prod(spec.shape)) * spec.dtype.itemsize
        for spec in specs
    )


def outside_limits(target: Target, config: ModelConfig, tp: int) -> dict[str, str]:
    """Fused path to the reason why the hardware cannot take its slices."""
    found = {}
    for _, group, fused in target.linears(config):
        reason = unsupported_reason(*fused_shape(group, tp))
        if reason:
            found[fused] = reason
    return found
