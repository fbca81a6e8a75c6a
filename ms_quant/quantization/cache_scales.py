"""The static scales of what is in int8 with a cache, from what calibration has seen."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

from ms_quant.models.block_spec import BlockSpec
from ms_quant.models.names import block_prefix
from ms_quant.numerics import kv_cache
from ms_quant.schemes.table import ABSMAX_CACHE


def cache_scales(
    block: BlockSpec,
    kind: str,
    dtype: np.dtype,
    ranges: Mapping[str, np.ndarray],
    divisors: Mapping[str, ArrayLike] = MappingProxyType({}),
) -> dict[str, np.ndarray]:
    """The scales of a block's cache, by path, keys before values.

    Args:
        block: the block.
        kind: of static caches, which says how far the ranges of heads reach.
        dtype: of the model; holds the scales of channels exactly.
        ranges: path to what :class:`~ms_quant.statistics.observers.CacheRange` has found.
        divisors: path of a linear to what divides its outputs.
    """
    found, whole = {}, kind == ABSMAX_CACHE
    for path, spec in block.cached.items():
        name = f"{block_prefix(block.index)}{path}: cached output"
        if spec.heads:
            found[path] = kv_cache.head_scale(ranges[path][0 if whole else 1], name)
        else:
            absmax = ranges[path] / divisors.get(path, 1)
            found[path] = kv_cache.channel_scale(absmax, dtype, name)
    return found
