"""int4 codes packed in pairs or words, in each layout that a runtime reads, in NumPy.

Codes are int8 (out, in) arrays of -8..7, N = out and K = in below. Unless said otherwise a
nibble is two's complement, ``q & 15``, and the pair's even element is in the low nibble.

=====================  ==============  =========================================================
layout                 stored          read by
=====================  ==============  =========================================================
``along_out``          int8 (N/2, K)   W4A8_DYNAMIC of vllm-ascend
``words``              int32 (N, K/8)  compressed-tensors' pack-quantized; K/4 for int8 codes
``nibbles``            uint8 (N, K/2)  E2M1 weights of msModelSlim, MindIE-SD and vllm-ascend
not packed             int8 (N, K)     W4A4_DYNAMIC, FlatQuant; MindIE-SD, which packs at load
=====================  ==============  =========================================================

Packing and unpacking are each other's inverse for every code and every byte.

Source: the checkpoints' formulas as docs/numerics.md states them.
"""

from __future__ import annotations

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.numerics.affine import LIMITS

WORD_BITS, WORD = 32, np.dtype("<i4")


def pack_along_out(codes: np.ndarray, name: str) -> np.ndarray:
    """Pairs of adjacent output rows: int8 (N, K) to int8 (N/2, K).

    ::

        bit        7        4 3        0
        byte[i,k]  q[2i+1, k] q[2i, k]
    """
    _check_codes(codes, name, axis=0, multiple=2)
    return _join(codes[::2], codes[1::2])


def unpack_along_out(packed: np.ndarray, name: str) -> np.ndarray:
    """int8 or uint8 (N/2, K) to int8 (N, K); inverts :func:`pack_along_out`."""
    return np.stack(_nibbles(packed, name), axis=1).reshape(2 * len(packed), packed.shape[1])


def pack_words(codes: np.ndarray, name: str, bits: int = 4) -> np.ndarray:
    """Adjacent inputs in words, eight of int4 or four of int8: (N, K) to int32 (N, K * bits / 32).

    Codes have half their range added, not two's complement; for int4::

        bit        31        28     7          4 3        0
        word[n,j]  q[n, 8j+7]+8 ... q[n, 8j+1]+8 q[n, 8j]+8

    The contract gives no padding: K that does not fill words is refused.
    """
    _check_codes(codes, name, axis=1, multiple=WORD_BITS // bits, bits=bits)
    unsigned = codes.view(np.uint8) + _half(bits)  # wraps: -8 is 248, and 248 + 8 is 0
    packed = pack_nibbles(unsigned, name) if bits == 4 else unsigned
    return np.ascontiguousarray(packed).view(WORD)


def unpack_words(packed: np.ndarray, name: str, bits: int = 4) -> np.ndarray:
    """int32 (N, K * bits / 32) to int8 (N, K); inverts :func:`pack_words`."""
    _check_array(packed, name, ("int32",))
    unsigned = np.ascontiguousarray(packed, WORD).view(np.uint8)
    if bits == 4:
        unsigned = unpack_nibbles(unsigned, 2 * unsigned.shape[1], name)
    return (unsigned - _half(bits)).view(np.int8)


def pack_nibbles(codes: np.ndarray, name: str) -> np.ndarray:
    """Codes of four bits without a sign, such as E2M1: pairs along the last axis, low nibble first.

    Weights have an even number of inputs; the zero nibble after an odd number is our choice.

    Args:
        codes: uint8 (..., K), each below 16.
        name: the tensor's name, for the error.

    Returns:
        uint8 (..., ceil(K / 2)); after an odd K the last high nibble is 0.

    Raises:
        MsQuantError: a code does not fit four bits.
    """
    if codes.size and codes.max() > 15:
        raise BadArgumentError(
            f"{name}: code {codes.max()} does not fit 4 bits, expected at most 15"
        )
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    pairs = np.ascontiguousarray(codes).view("<u2")  # 16 bits at a time, three times as fast
    return (pairs | pairs >> 4).astype(np.uint8)


def unpack_nibbles(packed: np.ndarray, length: int, name: str) -> np.ndarray:
    """The inverse of :func:`pack_nibbles`.

    Args:
        packed: uint8 (..., ceil(length / 2)).
        length: K, the number of codes along the last axis.
        name: the tensor's name, for the error.

    Returns:
        uint8 (..., length), each below 16.

    Raises:
        MsQuantError: the last axis does not hold ``length`` codes.
    """
    expected = (length + 1) // 2
    if packed.shape[-1] != expected:
        raise BadArgumentError(
            f"{name}: {packed.shape[-1]} bytes along the last axis, expected {expected} "
            f"for {length} codes"
        )
    codes = np.stack([packed & 15, packed >> 4], axis=-1)
    return codes.reshape(*packed.shape[:-1], 2 * expected)[..., :length]


def _half(bits: int) -> np.uint8:
    return np.uint8(-LIMITS[bits][0])


def _join(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    bits = (low.view(np.uint8) & np.uint8(15)) | (high.view(np.uint8) << np.uint8(4))
    return np.ascontiguousarray(bits).view(np.int8)


def _nibbles(packed: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """int8 low and high nibbles; an arithmetic right shift extends the sign."""
    _check_array(packed, name, ("int8", "uint8"))
    signed = packed.view(np.int8)
    return (signed << np.int8(4)) >> np.int8(4), signed >> np.int8(4)


def _check_codes(codes: np.ndarray, name: str, axis: int, multiple: int, bits: int = 4) -> None:
    _check_array(codes, name, ("int8",))
    if codes.shape[axis] % multiple:
        side = ("out", "in")[axis]
        raise BadArgumentError(
            f"{name}: {side} = {codes.shape[axis]} of shape {codes.shape}, "
            f"expected a multiple of {multiple} to pack int{bits}"
        )
    smallest, largest = LIMITS[bits]
    if codes.size and (codes.min() < smallest or codes.max() > largest):
        raise BadArgumentError(
            f"{name}: codes {codes.min()}..{codes.max()}, expected {smallest}..{largest} for "
            f"int{bits}"
        )


def _check_array(array: np.ndarray, name: str, dtypes: tuple[str, ...]) -> None:
    if array.ndim != 2 or array.dtype.name not in dtypes:
        raise BadArgumentError(
            f"{name}: {array.dtype.name} of shape {array.shape}, expected two axes "
            f"of {' or '.join(dtypes)}"
        )
