"""C8: keys and values cached in int8, in NumPy.

=====================  ===================  ================================================
granularity            scale of (..., C)    tensors in the checkpoint
=====================  ===================  ================================================
per-channel, static    (C,)                 ``k_proj.kv_cache_scale``, ``v_proj.kv_cache_scale``
per-head, static       (heads, 1)           ``fa_q.scale``, ``fa_k.scale``, ``fa_v.scale``
per-token, dynamic     (..., 1)             none
=====================  ===================  ================================================

C is kv heads * head_dim, of a token's keys after the rotary embedding, or of its values. Heads are
those of latent attention: of queries in the latent space, and the one of the latent vectors. A code
is clip(round(x / scale), -128, 127) and stands for q * scale: vllm-ascend reads codes back without
an offset, so there is none.

Source: msModelSlim 26.1 ``dynamic_cache``, vllm-ascend of 2026-08; docs/numerics.md states them.
"""

from __future__ import annotations

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.numerics import affine, groupwise
from ms_quant.numerics.storage import round_up


def channel_scale(absmax: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Static scales from the largest magnitude seen of each channel.

    Args:
        absmax: float (C,), at least 0.
        dtype: a type that holds the scales exactly.
        name: the tensor's name, for errors.

    Returns:
        float32 (C,): absmax / 127, rounded up to `dtype`; 1 for a channel of zeros.
    """
    scale = affine.symmetric_scale(groupwise.finite(absmax, name))
    return round_up(scale, dtype, name).astype(np.float32)


def head_scale(absmax: np.ndarray, name: str) -> np.ndarray:
    """Static scales from how far the range of each head reaches.

    Args:
        absmax: float (heads,), at least 0.
        name: the tensor's name, for errors.

    Returns:
        float32 (heads,): absmax / 127, which is stored in float32; 1 for a head of zeros.
    """
    return affine.symmetric_scale(groupwise.finite(absmax, name))


def quantize_channels(x: np.ndarray, scale: np.ndarray, name: str) -> np.ndarray:
    """int8 codes of float (..., C) with static scales (C,)."""
    if x.shape[-1:] != scale.shape:
        raise BadArgumentError(f"{name}: scale {scale.shape} does not fit {x.shape}")
    return affine.quantize(groupwise.finite(x, name), scale)


def quantize_tokens(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of float (..., C): int8 (..., C), float32 (..., 1), one a token."""
    wide = groupwise.finite(x, name)
    scale = affine.per_token_scale(wide)
    return affine.quantize(wide, scale), scale
