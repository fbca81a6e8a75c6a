"""OCP microscaling: blocks of 32 along the last axis that share a power of two, in NumPy.

A value is decode(code) * 2**e with an E4M3 (MXFP8) or E2M1 (MXFP4) code. The exponent is stored as
the byte e + 127 (E8M0), clamped to 0..254 before the elements are quantized, so that codes always
belong to the stored exponent; byte 255, a NaN, is never written and is refused when read. A short
last block is padded with zeros, which are cut off again: they change neither maximum nor error.

How the exponent is chosen and how elements are rounded: :mod:`ms_quant.numerics.mx_rules`.

Source: OCP Microscaling Formats 1.0; the dual scale and its block of 512 from MindIE-SD.
``docs/numerics.md`` says what of this is inferred.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ms_quant.errors import BadArgumentError
from ms_quant.numerics.affine import symmetric_scale
from ms_quant.numerics.minifloat import (
    E2M1,
    Minifloat,
    decode,
    encode,
    finite_float32,
    round_to,
)
from ms_quant.numerics.mx_rules import BIAS, HUGE, MxRule

BLOCK = 32
DUAL_BLOCK = 512  # what mindie-sd reads


class Blocks(NamedTuple):
    """A tensor in MXFP8 or MXFP4."""

    codes: np.ndarray  # uint8 (..., K), of the rule's element format, not packed
    exponents: np.ndarray  # uint8 (..., ceil(K / 32)), E8M0


class DualBlocks(NamedTuple):
    """A tensor in MXFP4 with a second, float32 scale for each long block."""

    codes: np.ndarray  # uint8 (..., K), E2M1, not packed
    exponents: np.ndarray  # uint8 (..., ceil(K / 32)), E8M0
    scales: np.ndarray  # float32 (..., ceil(K / D), 1)


def encode_exponent(exponent: ArrayLike) -> np.ndarray:
    """E8M0 bytes of integer exponents: e + 127, clamped to 0..254."""
    return np.clip(np.asarray(exponent) + BIAS, 0, 254).astype(np.uint8)


def decode_exponent(byte: np.ndarray, name: str = "exponents") -> np.ndarray:
    """The int32 exponents of E8M0 bytes, -127..127.

    Raises:
        MsQuantError: a byte is 255, the NaN of E8M0; names the tensor.
    """
    bad = int(np.count_nonzero(byte == 255))
    if bad:
        raise BadArgumentError(
            f"{name}: {bad} of {byte.size} E8M0 bytes are 255 (NaN), expected 0..254"
        )
    return byte.astype(np.int32) - BIAS


def in_blocks(x: np.ndarray, size: int) -> np.ndarray:
    """(..., K) -> (..., ceil(K / size), size), the last block padded with zeros."""
    count = -(-x.shape[-1] // size)
    pad = [(0, 0)] * (x.ndim - 1) + [(0, count * size - x.shape[-1])]
    return np.pad(x, pad).reshape(*x.shape[:-1], count, size)


def _out_of_blocks(blocks: np.ndarray, length: int) -> np.ndarray:
    flat = blocks.shape[-2] * blocks.shape[-1]
    return blocks.reshape(*blocks.shape[:-2], flat)[..., :length]


def _scaled(x: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """x * 2**exponent for blocks (..., n, size) and exponents (..., n), saturated in float32."""
    with np.errstate(over="ignore", under="ignore"):
        return np.clip(np.ldexp(x, exponent[..., None]), -HUGE, HUGE)


def shared_exponents(blocks: np.ndarray, rule: MxRule) -> np.ndarray:
    """The E8M0 bytes of blocks.

    Args:
        blocks: finite float32 (..., n, 32).

    Returns:
        uint8 (..., n).
    """
    amax = np.abs(blocks).max(axis=-1, initial=0)
    best = encode_exponent(rule.exponents[0](amax))
    if len(rule.exponents) == 1:
        return best
    least = _squared_error(blocks, best, rule)
    for exponent_rule in rule.exponents[1:]:
        other = encode_exponent(exponent_rule(amax))
        error = _squared_error(blocks, other, rule)
        best = np.where(error < least, other, best)
        least = np.minimum(error, least)
    return best


def _squared_error(blocks: np.ndarray, byte: np.ndarray, rule: MxRule) -> np.ndarray:
    exponent = decode_exponent(byte)
    near = _scaled(round_to(_scaled(blocks, -exponent), rule.element, rule.rounding), exponent)
    difference = near.astype(np.float64) - blocks
    return np.square(difference).sum(axis=-1)


def quantize(x: ArrayLike, rule: MxRule, name: str = "x") -> Blocks:
    """Quantizes to MXFP8 or MXFP4 along the last axis.

    Args:
        x: float array (..., K), at least one axis.
        rule: one of ``mx_rules.RULES``, or of ``mx_rules.cann2`` and ``msmodelslim_ceil_x``.
        name: the tensor's name, for the error.

    Raises:
        MsQuantError: a value is NaN or infinite.
    """
    values = finite_float32(x, name)
    blocks = in_blocks(values, BLOCK)
    byte = shared_exponents(blocks, rule)
    steps = _scaled(blocks, -decode_exponent(byte))
    codes = encode(steps, rule.element, rule.rounding, name)
    return Blocks(_out_of_blocks(codes, values.shape[-1]), byte)


def dequantize(
    codes: np.ndarray, exponents: np.ndarray, element: Minifloat, name: str = "codes"
) -> np.ndarray:
    """The float32 values (..., K) of a tensor in MXFP8 or MXFP4.

    Exact but for values beyond float32, which a ceil rule can give to a block next to its largest
    number and which saturate at it.

    Args:
        codes: uint8 (..., K).
        exponents: uint8 E8M0 (..., ceil(K / 32)).
        element: E4M3 or E2M1.
        name: the tensor's name, for the error.

    Raises:
        MsQuantError: a code or an exponent is NaN, or there are not ceil(K / 32) exponents.
    """
    blocks = in_blocks(decode(codes, element, name), BLOCK)
    if exponents.shape != blocks.shape[:-1]:
        raise BadArgumentError(
            f"{name}: exponents of shape {exponents.shape}, expected {blocks.shape[:-1]}"
        )
    return _out_of_blocks(_scaled(blocks, decode_exponent(exponents, name)), codes.shape[-1])


def dual_scales(x: np.ndarray, size: int = DUAL_BLOCK) -> np.ndarray:
    """The first level of the dual scale: amax / 6 of each long block.

    Args:
        x: finite float32 (..., K).
        size: D, the length of a long block.

    Returns:
        float32 (..., ceil(K / D), 1); 1 where amax / 6 is no normal number, zero blocks included.
    """
    amax = np.abs(in_blocks(x, size)).max(axis=-1, keepdims=True, initial=0)
    return symmetric_scale(amax, E2M1.largest)


def quantize_dual(
    x: ArrayLike,
    rule: MxRule,
    size: int = DUAL_BLOCK,
    between: np.dtype = np.dtype(np.float32),  # noqa: B008 - a dtype does not change
    name: str = "x",
) -> DualBlocks:
    """Quantizes to MXFP4 with two levels of scales: MXFP4 of x / (amax / 6 of its long block).

    Args:
        x: float array (..., K).
        rule: one for MXFP4; msModelSlim's offline rule for weights, CANN's algorithm 0 online.
        size: D, a multiple of 32; the last long block may be short.
        between: the type that x / scale is rounded to: float32 offline, x's own type online.
        name: the tensor's name, for the errors.

    Raises:
        MsQuantError: a value is NaN or infinite, D is no multiple of 32, or the rule is for MXFP8.
    """
    _check_dual(size, rule.element)
    values = finite_float32(x, name)
    scales = dual_scales(values, size)
    steps = _out_of_blocks(in_blocks(values, size) / scales, values.shape[-1])
    codes, exponents = quantize(steps.astype(between), rule, name)
    return DualBlocks(codes, exponents, scales)


def dequantize_dual(
    codes: np.ndarray,
    exponents: np.ndarray,
    scales: np.ndarray,
    size: int = DUAL_BLOCK,
    name: str = "codes",
) -> np.ndarray:
    """The float32 values (..., K) of :class:`DualBlocks`: (code * 2**e) * scale, rounded once.

    Raises:
        MsQuantError: as :func:`dequantize`, or there are not ceil(K / D) scales.
    """
    _check_dual(size, E2M1)
    blocks = in_blocks(dequantize(codes, exponents, E2M1, name), size)
    if scales.shape != (*blocks.shape[:-1], 1):
        raise BadArgumentError(
            f"{name}: dual scales of shape {scales.shape}, expected {(*blocks.shape[:-1], 1)}"
        )
    return _out_of_blocks(blocks * scales, codes.shape[-1])


def _check_dual(size: int, element: Minifloat) -> None:
    if size <= 0 or size % BLOCK:
        raise BadArgumentError(f"dual block of {size}, expected a multiple of {BLOCK}")
    if element != E2M1:
        raise BadArgumentError(f"a dual scale over {element.dtype.name}, expected float4_e2m1fn")
