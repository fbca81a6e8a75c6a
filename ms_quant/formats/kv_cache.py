"""The tensors of a key-value cache in int8: next to the linears whose outputs are cached.

docs/ascend_format.md states them. The description calls them by the cache's name.
"""

from __future__ import annotations

import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.files.reader import Checkpoint
from ms_quant.files.writer import TensorPlan

SCALE, OFFSET = "kv_cache_scale", "kv_cache_offset"
SUFFIXES = (SCALE, OFFSET)


def tensor_plans(path: str, channels: int) -> list[TensorPlan]:
    """Of one linear whose outputs are cached."""
    zeros = np.zeros(channels, np.float32)
    makes = (lambda tensor, numbers: numbers.cache_scale(path), lambda tensor, numbers: zeros)
    return [
        TensorPlan(f"{path}.{suffix}", zeros.dtype, (channels,), make=make)
        for suffix, make in zip(SUFFIXES, makes, strict=True)
    ]


def read_scale(checkpoint: Checkpoint, path: str) -> np.ndarray:
    """float32 (channels,), positive.

    Raises:
        MsQuantError: a scale is not positive, or an offset is not 0: runtimes read codes back
            without it.
    """
    scale = checkpoint.read_float32(f"{path}.{SCALE}")
    offset = checkpoint.read_float32(f"{path}.{OFFSET}")
    for suffix, good, what in (
        (SCALE, scale > 0, "scales are not positive"),
        (OFFSET, offset == 0, "offsets are not 0, runtimes ignore them"),
    ):
        wrong = int(good.size - np.count_nonzero(good))
        if wrong:
            raise BadFileError(f"{path}.{suffix}: {wrong} of {good.size} {what}")
    return scale
