"""The key-value caches that a checkpoint is evaluated with."""

from __future__ import annotations

from collections.abc import Callable

from ms_quant.errors import BadArgumentError
from ms_quant.formats.opening import ServedModel
from ms_quant.models.cache import Int8KeyValueCache, KeyValueCache, static_cache
from ms_quant.schemes.table import DYNAMIC_CACHE, FLOAT_CACHE, STATIC_CACHE

KINDS = FLOAT_CACHE, STATIC_CACHE, DYNAMIC_CACHE


def new_caches(model: ServedModel, kind: str | None = None) -> list[Callable[..., KeyValueCache]]:
    """What makes an empty cache, for each block.

    Args:
        model: the checkpoint.
        kind: one of ``KINDS``; None is the checkpoint's own.

    Raises:
        MsQuantError: there is no such kind, or the checkpoint has no scales for it.
    """
    if kind not in (None, *KINDS):
        raise BadArgumentError(f"kv cache {kind!r} is unknown, expected one of {', '.join(KINDS)}")
    if kind == DYNAMIC_CACHE:
        return [Int8KeyValueCache] * model.config.num_layers
    scales = [model.cache_scales(index) for index in range(model.config.num_layers)]
    if kind == STATIC_CACHE and not any(scales):
        raise BadArgumentError(
            f"kv cache {kind}: the checkpoint has no scales for it, expected another"
        )
    if kind == FLOAT_CACHE:
        return [KeyValueCache] * model.config.num_layers
    blocks = model.config.blocks
    return [static_cache(b, s) if s else KeyValueCache for b, s in zip(blocks, scales, strict=True)]
