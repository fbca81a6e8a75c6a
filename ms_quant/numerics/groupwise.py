"""Affine quantization in blocks of any shape, 8 or 4 bits, symmetric or asymmetric, in NumPy.

One primitive serves every granularity. A block shape has one side for each axis of the tensor,
and ``WHOLE`` stands for all of an axis; every block has one scale and one zero point, and their
arrays have one element for each block:

=====================  ===========  =============  ===============
granularity            x            block          scale
=====================  ===========  =============  ===============
per-tensor             (N, K)       (WHOLE, WHOLE) (1, 1)
per-channel            (N, K)       (1, WHOLE)     (N, 1)
per-group, G along K   (N, K)       (1, G)         (N, K / G)
per-token              (..., K)     (1.., WHOLE)   (..., 1)
per KV channel         (tokens, C)  (WHOLE, 1)     (1, C)
=====================  ===========  =============  ===============

These are the shapes that checkpoints store. A scale's shape alone says how a tensor is divided,
so only :func:`parameters` is told the block.

**Offsets.** Everywhere in this project a code q with zero point z stands for (q - z) * scale, as
in msModelSlim's formulas. CANN's antiquant, so vllm-ascend's W8A16, computes (q + offset) * scale:
for it :func:`antiquant_offset` negates. Symmetric tensors have zeros in both.

Source: the rules of :mod:`ms_quant.numerics.affine`; block sizes as in torchao's quant_primitives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.numerics import affine

WHOLE = -1


@dataclass(frozen=True)
class Parameters:
    """What codes are read with.

    Attributes:
        scale: float32, one for each block.
        zero_point: int8, the same shape; zeros when symmetric.
        bits: 8 or 4.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    bits: int = 8


def parameters(
    x: np.ndarray, block: Sequence[int], name: str, *, bits: int = 8, symmetric: bool = True
) -> Parameters:
    """Scales and zero points from a tensor's own range.

    Args:
        x: float array.
        block: one side for each axis, or ``WHOLE``.
        name: the tensor's name, for errors.
        bits: 8 or 4.
        symmetric: absmax / 127 or / 7, else (max - min) / 255 or / 15 and a zero point.

    Raises:
        MsQuantError: a block does not divide the tensor, or a value is NaN, inf or beyond float32.
    """
    blocks, axes = _split(finite(x, name), _counts(x.shape, block, name), name)
    if symmetric:
        scale = affine.symmetric_scale(np.abs(blocks).max(axes, initial=0), affine.LIMITS[bits][1])
        return Parameters(scale, np.zeros(scale.shape, np.int8), bits)
    low, high = blocks.min(axes, initial=0), blocks.max(axes, initial=0)
    return Parameters(*affine.asymmetric_parameters(low, high, bits), bits)


def quantize(x: np.ndarray, by: Parameters, name: str) -> np.ndarray:
    """int8 codes of the shape of ``x``, which is finite and divided as ``by.scale`` says."""
    blocks, axes = _split(finite(x, name), by.scale.shape, name)
    scale, zero_point = (np.expand_dims(array, axes) for array in (by.scale, by.zero_point))
    return affine.quantize(blocks, scale, zero_point, by.bits).reshape(x.shape)


def dequantize(codes: np.ndarray, by: Parameters, name: str) -> np.ndarray:
    """float32 of the shape of ``codes``: (q - zero_point) * scale."""
    blocks, axes = _split(codes, by.scale.shape, name)
    scale, zero_point = (np.expand_dims(array, axes) for array in (by.scale, by.zero_point))
    return affine.dequantize(blocks, scale, zero_point).reshape(codes.shape)


def antiquant_offset(zero_point: np.ndarray) -> np.ndarray:
    """float32 offsets for a runtime that adds them, (q + offset) * scale.

    Float, as checkpoints store them, and as -(-128) is no int8.
    """
    return -zero_point.astype(np.float32) + np.float32(0)  # + 0: no negative zeros in files


def finite(x: np.ndarray, name: str) -> np.ndarray:
    """``x`` in float32, refused by name if that holds NaN or inf."""
    with np.errstate(over="ignore"):
        wide = np.asarray(x, np.float32)
    affine.check_finite(wide, name)
    return wide


def _counts(shape: tuple[int, ...], block: Sequence[int], name: str) -> tuple[int, ...]:
    if len(block) != len(shape):
        raise BadArgumentError(
            f"{name}: a block of {len(block)} axes, expected {len(shape)} for the shape {shape}"
        )
    for axis, (size, side) in enumerate(zip(shape, block, strict=True)):
        if side != WHOLE and (side < 1 or size % side):
            raise BadArgumentError(
                f"{name}: groups of {side} do not divide K = {size}, axis {axis} of {shape}"
            )
    return tuple(
        1 if side == WHOLE else size // side for size, side in zip(shape, block, strict=True)
    )


def _split(x: np.ndarray, counts: tuple[int, ...], name: str) -> tuple[np.ndarray, tuple[int, ...]]:
    """``x`` as (count, side, count, side, ...), and the axes of the sides."""
    if len(counts) != x.ndim or any(
        size % count if count else size for size, count in zip(x.shape, counts, strict=True)
    ):
        raise BadArgumentError(
            f"{name}: scales of shape {counts} do not divide a tensor of {x.shape}"
        )
    sides = ((c, s // c if c else 1) for s, c in zip(x.shape, counts, strict=True))
    shape = [size for pair in sides for size in pair]
    return x.reshape(shape), tuple(range(1, 2 * x.ndim, 2))
