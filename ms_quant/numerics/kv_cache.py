"""C8: keys and values cached in int8, in NumPy.

=====================  ===================  =============================================
granularity            scale of (..., C)    tensors in the checkpoint
=====================  ===================  =============================================
per-channel, static    (C,)                 ``k_proj.kv_cache_scale``, ``kv_cache_offset``
per-token, dynamic     (..., 1)             none
=====================  ===================  =============================================

C is kv heads * head_dim, of a token's key or value. q = round(x / scale + offset), and a code
stands for (q - offset) * scale. vllm-ascend reads it back as q * scale and ignores the offset: for
it only symmetric scales are right, whose offset is 0.

Source: msModelSlim 26.1 ``dynamic_cache``, vllm-ascend of 2026-08; docs/numerics.md states them.
"""

from __future__ import annotations

import numpy as np

from ms_quant.errors import MsQuantError
from ms_quant.numerics import affine, groupwise


def channel_parameters(
    low: np.ndarray, high: np.ndarray, name: str, *, symmetric: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Static parameters from each channel's observed range.

    Args:
        low: float32 (C,), smallest value seen.
        high: float32 (C,), largest value seen.
        name: the tensor's name, for errors.
        symmetric: absmax / 127 with offset 0; else (max - min) / 255 and an offset.

    Returns:
        (scale float32 (C,), offset int8 (C,)).
    """
    low, high = groupwise.finite(low, name), groupwise.finite(high, name)
    if low.ndim != 1 or low.shape != high.shape:
        raise MsQuantError(f"{name}: ranges of {low.shape} and {high.shape}, expected one axis")
    if not symmetric:
        return affine.asymmetric_parameters(low, high)
    scale = affine.symmetric_scale(np.maximum(np.abs(low), np.abs(high)))
    return scale, np.zeros(scale.shape, np.int8)


def quantize_channels(
    x: np.ndarray, scale: np.ndarray, offset: np.ndarray, name: str
) -> np.ndarray:
    """int8 codes of float (..., C) with static parameters (C,)."""
    if x.shape[-1:] != scale.shape or scale.shape != offset.shape:
        raise MsQuantError(
            f"{name}: scale {scale.shape} and offset {offset.shape} do not fit {x.shape}"
        )
    return affine.quantize(groupwise.finite(x, name), scale, offset)


def quantize_tokens(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and symmetric scales of float (..., C): int8 (..., C), float32 (..., 1).

    The scale covers the last axis: (tokens, heads * dim) has one a token, (tokens, heads, dim)
    one a token and head. Codes stand for q * scale: :func:`affine.dequantize`.
    """
    wide = groupwise.finite(x, name)
    scale = affine.per_token_scale(wide)
    return affine.quantize(wide, scale), scale
