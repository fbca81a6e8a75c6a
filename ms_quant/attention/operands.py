"""Quantized queries, keys and values: codes, and scales of blocks of tokens x channels.

==================  ===================  =============  =======================================
made by             tokens x channels    codes          scales
==================  ===================  =============  =======================================
fa_block_quant      rows x 128           e4m3           amax / 448; 0 of a block of zeros
quantize_mx         1 x 32 or 32 x 1     e4m3 or e2m1   a power of two, stored as E8M0 bytes
int8_per_head       all x all            int8           given: absmax / 127 of calibration
int8_blocks         rows x columns       int8           amax / 127; 1 of a block of zeros
fp8_per_channel     all x 1              e4m3           amax / 448; 0 of a channel of zeros
==================  ===================  =============  =======================================

Every batch and head has scales of its own; a block at an end may be short.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ms_quant import kernels
from ms_quant.attention.layouts import heads_first
from ms_quant.errors import BadArgumentError
from ms_quant.numerics import mx
from ms_quant.numerics.affine import quantize, symmetric_scale
from ms_quant.numerics.minifloat import E4M3, Minifloat, decode, encode, finite_float32
from ms_quant.numerics.mx_rules import MxRule

COLUMNS = 128  # of an FP8 block


@dataclass(frozen=True)
class QuantizedOperand:
    """A quantized q, k or v, as a kernel would take it.

    Attributes:
        codes: (batch, heads, length, size), int8, or uint8 codes of ``element``.
        scales: (batch, heads, ceil(length / block[0]), ceil(size / block[1])), float32, or uint8
            E8M0 exponents.
        block: tokens and channels that share a scale.
        element: what uint8 codes are; None when they are int8.
    """

    codes: np.ndarray
    scales: np.ndarray
    block: tuple[int, int]
    element: Minifloat | None = None

    def values(self) -> np.ndarray:
        """float32 (batch, heads, length, size): code * scale."""
        raw = (
            self.codes.astype(np.float32)
            if self.element is None
            else decode(self.codes, self.element)
        )
        if self.scales.dtype == np.uint8:
            exponents = _spread(mx.decode_exponent(self.scales), self.block, raw.shape)
            return np.ldexp(raw, exponents)
        return raw * _spread(self.scales, self.block, raw.shape)


def in_order(x: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Tokens of (batch, heads, tokens, size) in an order (1 or heads, tokens); as is without."""
    if order is None:
        return x
    if len(order) == 1:
        return np.take(x, order[0], axis=2)
    return np.take_along_axis(x, order[None, :, :, None], axis=2)


def fa_block_quant(
    x: ArrayLike, block_size: int, col_block_size: int = COLUMNS, layout: str = "BNSD"
) -> tuple[np.ndarray, np.ndarray]:
    """FP8 codes of blocks of tokens, as MindIE-SD's ``fa_block_quant_preprocess`` makes them.

    scale = amax / 448 and code = e4m3(clip(x / scale, +-448)), half to even, all in float32. A
    block of zeros (or one below 448 * 2**-150) has scale 0 and codes 0. Any batch and any length;
    NaN and infinity are refused, where the operator takes them for 0 in amax.

    Args:
        x: float, of four axes in ``layout``.
        block_size: tokens of a block: 128 for queries, 256 for keys and values.
        col_block_size: channels of a block.

    Returns:
        uint8 codes (batch, heads, length, size) and float32 scales (batch, heads,
        ceil(length / block_size), ceil(size / col_block_size)), heads first for either layout.
    """
    values = heads_first(finite_float32(x, "x"), layout)
    made = fp8_blocks(values, (block_size, col_block_size))
    return made.codes, made.scales


def fp8_blocks(
    x: np.ndarray, block: tuple[int, int], order: np.ndarray | None = None
) -> QuantizedOperand:
    """FP8 with one float32 scale of each block.

    Here and below tokens are first put in an order, int64 (1 or heads, tokens), if one is given.
    """
    if _is_native(x, block):
        made = kernels.quantize_heads(x, "e4m3", block, order=order)
        return QuantizedOperand(made.codes, made.scales, block, E4M3)
    x = in_order(x, order)
    scales = block_absmax(x, block) / np.float32(E4M3.largest)
    divisor = _spread(np.where(scales > 0, scales, np.float32(np.inf)), block, x.shape)
    return QuantizedOperand(encode(x / divisor, E4M3), scales, block, E4M3)


def _is_native(x: np.ndarray, block: tuple[int, int]) -> bool:
    """Whether the kernels take it; they give the same bits."""
    able = kernels.available() and x.strides[3] == x.itemsize
    return able and min(block) >= 1 and x.shape[3] <= kernels.MOST_HEAD_SIZE


def fp8_per_channel(x: np.ndarray, order: np.ndarray | None = None) -> QuantizedOperand:
    """FP8 with one scale of each channel, over all tokens."""
    return fp8_blocks(x, (x.shape[2], 1), order)


def int8_blocks(
    x: np.ndarray, block: tuple[int, int], order: np.ndarray | None = None
) -> QuantizedOperand:
    """int8 with one scale of each block; a block of (1, size) is a token."""
    if _is_native(x, block):
        made = kernels.quantize_heads(x, "int8", block, order=order)
        return QuantizedOperand(made.codes, made.scales, block)
    x = in_order(x, order)
    scales = symmetric_scale(block_absmax(x, block))
    return QuantizedOperand(quantize(x, _spread(scales, block, x.shape)), scales, block)


def head_scales(x: np.ndarray) -> np.ndarray:
    """absmax / 127 of each head over a batch (batch, heads, length, size): float32 (heads, 1)."""
    return symmetric_scale(np.abs(x).max(axis=(0, 2, 3), initial=0))[:, None]


def int8_per_head(
    x: np.ndarray, scale: ArrayLike, name: str = "scale", order: np.ndarray | None = None
) -> QuantizedOperand:
    """int8 with a scale of each head from a file, float (heads,), (heads, 1) or of one value.

    Raises:
        MsQuantError: it has another shape, or is not positive and finite.
    """
    heads, stored = x.shape[1], np.asarray(scale, np.float32).reshape(-1)
    if stored.size not in (1, heads):
        raise BadArgumentError(f"{name}: {stored.size} values, expected 1 or {heads} (heads)")
    if not (np.isfinite(stored).all() and (stored > 0).all()):
        raise BadArgumentError(f"{name}: a value is not positive, expected positive finite scales")
    scales = np.broadcast_to(stored[:, None, None], (len(x), heads, 1, 1)).copy()
    block = (x.shape[2], x.shape[3])
    if _is_native(x, block):
        made = kernels.quantize_heads(x, "int8", block, scales=scales, order=order)
        return QuantizedOperand(made.codes, scales, block)
    return QuantizedOperand(quantize(in_order(x, order), scales), scales, block)


def quantize_mx(
    x: np.ndarray, rule: MxRule, along_tokens: bool, name: str, order: np.ndarray | None = None
) -> QuantizedOperand:
    """MXFP8 or MXFP4: groups of 32 along the channels of a token, or along the tokens."""
    x = in_order(x, order)
    if not along_tokens:
        made = mx.quantize(x, rule, name)
        return QuantizedOperand(made.codes, made.exponents, (1, mx.BLOCK), rule.element)
    made = mx.quantize(x.swapaxes(2, 3), rule, name)
    codes, exponents = (np.ascontiguousarray(part.swapaxes(2, 3)) for part in made)
    return QuantizedOperand(codes, exponents, (mx.BLOCK, 1), rule.element)


def block_absmax(x: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """float32 (batch, heads, ceil(length / rows), ceil(size / columns)).

    Raises:
        MsQuantError: a side of the block is below 1.
    """
    if min(block) < 1:
        raise BadArgumentError(f"block of {block}, expected tokens and channels from 1")
    rows = np.arange(0, x.shape[2], block[0])
    columns = np.arange(0, x.shape[3], block[1])
    return np.maximum.reduceat(np.maximum.reduceat(np.abs(x), rows, axis=2), columns, axis=3)


def _spread(scales: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Each scale over the tokens and channels of its block; an axis of one block stays 1."""
    for axis, size in zip((2, 3), block, strict=True):
        if scales.shape[axis] > 1:
            scales = np.repeat(scales, size, axis=axis)
        scales = scales[(slice(None),) * axis + (slice(shape[axis]),)]
    return scales
