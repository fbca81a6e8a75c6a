"""The tensors of a cache in int8: next to the linears whose outputs are cached, or of attention.

docs/ascend_format.md states them. The description calls them by the cache's name, those that have a
scale for each head by that of quantized attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, short
from ms_quant.files.reader import Checkpoint
from ms_quant.files.writer import TensorPlan
from ms_quant.models.block_spec import CacheSpec
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import block_prefix
from ms_quant.plan.plan import Plan
from ms_quant.schemes.table import ABSMAX_CACHE, STATIC_CACHE

SUFFIXES = "kv_cache_scale", "kv_cache_offset"
OF_HEADS = "scale", "offset"
HEADS = "FAQuant"
"""What descriptions call the tensors of heads."""
ATTENTION, ATTENTIONS, OF_ATTENTION = "fa_quant_type", ("FAKQuant", HEADS), ".quant_type"
"""Which key says that attention is quantized, its values, ours first, and the end of the keys that
say how."""
CACHE, OTHER = "kv_cache_type", "kv_quant_type"
INT8 = "INT8"


def tensor_plans(path: str, spec: CacheSpec) -> list[TensorPlan]:
    """Of one path of what is in int8."""
    shape = (spec.scales, 1) if spec.heads else (spec.scales,)
    scale, offset = OF_HEADS if spec.heads else SUFFIXES
    zeros = np.zeros(shape, np.int8 if spec.heads else np.float32)
    return [
        TensorPlan(
            f"{path}.{scale}",
            np.dtype(np.float32),
            shape,
            make=lambda tensor, numbers: numbers.cache_scale(path).reshape(shape),
        ),
        TensorPlan(f"{path}.{offset}", zeros.dtype, shape, make=lambda tensor, numbers: zeros),
    ]


def entries(plan: Plan) -> dict[str, str]:
    """What the description calls each tensor, and how it says that attention is quantized."""
    found = {}
    for block in plan.config.blocks:
        for path, spec in plan.cached(block.index).items():
            full = f"{block_prefix(block.index)}{path}"
            for tensor in tensor_plans(full, spec):
                found[tensor.name] = HEADS if spec.heads else STATIC_CACHE
            if spec.heads:
                found[full.rpartition(".")[0] + OF_ATTENTION] = INT8
    return found


def global_entries(plan: Plan) -> dict[str, str]:
    """What the description says of the whole model."""
    if not plan.kv_cache:
        return {}
    if _of_heads(plan.config):
        return {ATTENTION: ATTENTIONS[0]}
    return {CACHE: STATIC_CACHE, OTHER: STATIC_CACHE}


def _of_heads(config: ModelConfig) -> bool:
    cached = (spec for block in config.blocks for spec in block.cached.values())
    return any(spec.heads for spec in cached)


def without_attention(description: Mapping[str, Any]) -> dict[str, Any]:
    """A description without what it says of quantized attention, which is of no linear."""
    return {
        key: value
        for key, value in description.items()
        if value != HEADS and not key.endswith(OF_ATTENTION)
    }


def described(
    config: ModelConfig, description: Mapping[str, Any], record: Mapping[str, Any]
) -> tuple[str, frozenset[int]]:
    """How a checkpoint's keys and values are cached, and the blocks with a cache in float.

    Args:
        config: the model.
        description: as stored.
        record: what was done, where the files say so: scales do not tell how they were made.

    Raises:
        MsQuantError: the cache is of another kind.
    """
    cache, attention = (description.get(key) or "" for key in (CACHE, ATTENTION))
    if cache not in ("", STATIC_CACHE):
        raise BadFileError(f"{CACHE} is {short(cache)}, expected {STATIC_CACHE!r}")
    if not _of_heads(config):
        return cache, frozenset()
    if cache:
        raise BadFileError(f"{CACHE} is {short(cache)}, expected {ATTENTION} of latent attention")
    if attention not in ("", *ATTENTIONS):
        raise BadFileError(
            f"{ATTENTION} is {short(attention)}, expected {' or '.join(map(repr, ATTENTIONS))}"
        )
    if not attention:
        return "", frozenset()
    names = {key.rpartition(".")[0] for key, value in description.items() if value == HEADS}
    others = {
        block.index
        for block in config.blocks
        if not any(f"{block_prefix(block.index)}{path}" in names for path in block.cached)
    }
    kind = ABSMAX_CACHE if record.get("kv_cache") == ABSMAX_CACHE else STATIC_CACHE
    return kind, frozenset(others)


def read_scale(checkpoint: Checkpoint, path: str) -> np.ndarray:
    """float32 (scales,), positive.

    Raises:
        MsQuantError: a scale is not positive, or an offset is not 0: runtimes read codes back
            without it.
    """
    names = SUFFIXES if f"{path}.{SUFFIXES[0]}" in checkpoint else OF_HEADS
    scale = checkpoint.read_float32(f"{path}.{names[0]}").reshape(-1)
    offset = checkpoint.read(f"{path}.{names[1]}")  # of heads int8
    for suffix, good, what in (
        (names[0], scale > 0, "scales are not positive"),
        (names[1], offset == 0, "offsets are not 0, runtimes ignore them"),
    ):
        wrong = int(good.size - np.count_nonzero(good))
        if wrong:
            raise BadFileError(f"{path}.{suffix}: {wrong} of {good.size} {what}")
    return scale
