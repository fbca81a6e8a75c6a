"""What MindIE-SD's loader makes of each float tensor, by the type that it runs the model in.

Tensors are stored in these types, so that the loader rounds nothing, and what is read is narrowed
as it narrows it. docs/mindie_sd_format.md states the table.
"""

from __future__ import annotations

import numpy as np

from ms_quant.numerics.storage import DTYPES

FLOAT32 = DTYPES["float32"]
RUN_DTYPES = ("bfloat16", "float16")
WEIGHT_ONLY = ("W8A16", "W4A16")
NARROWED_BIAS = ("W8A8_DYNAMIC", "W8A8_TIMESTEP")


def run_dtype(dtype: np.dtype) -> np.dtype:
    """What a model of some type runs in: the loader takes no float32, its default is bfloat16."""
    return dtype if dtype.name in RUN_DTYPES else DTYPES["bfloat16"]


def held_dtype(type: str, suffix: str, dtype: np.dtype) -> np.dtype:
    """The type of a float tensor of a linear where it runs.

    Args:
        type: a name from ``mindie_sd_types.TYPES``.
        suffix: ``mul_scale``, ``weight_scale`` of integers, ``input_scale``, ``bias``; others
            are float32.
        dtype: what the model runs in; float32 where that is not decided.
    """
    if suffix in ("mul_scale", "weight_scale"):
        return dtype
    if suffix == "input_scale":
        return dtype if dtype.name == "bfloat16" else FLOAT32
    if suffix == "bias" and type in NARROWED_BIAS:
        return dtype
    # The operator of weights alone takes float16 with float16 and float32 with bfloat16.
    if suffix == "bias" and type in WEIGHT_ONLY and dtype.name == "float16":
        return dtype
    return FLOAT32
