"""Two 4-bit codes in a byte.

::

    bit      7 6 5 4 | 3 2 1 0
    element   2j + 1 |   2j        along the last axis

Source: the packed E2M1 weights of msModelSlim, MindIE-SD and vllm-ascend. Those have an even number
of inputs; the zero nibble after an odd number is this project's choice.
"""

from __future__ import annotations

import numpy as np

from ms_quant.errors import MsQuantError


def pack_nibbles(codes: np.ndarray, name: str = "codes") -> np.ndarray:
    """Packs along the last axis, the low nibble first.

    Args:
        codes: uint8 (..., K), each below 16.
        name: the tensor's name, for the error.

    Returns:
        uint8 (..., ceil(K / 2)); after an odd K the last high nibble is 0.

    Raises:
        MsQuantError: a code does not fit four bits.
    """
    if codes.size and codes.max() > 15:
        raise MsQuantError(f"{name}: code {codes.max()} does not fit 4 bits, expected at most 15")
    packed = codes[..., 0::2].copy()
    packed[..., : codes.shape[-1] // 2] |= codes[..., 1::2] << 4
    return packed


def unpack_nibbles(packed: np.ndarray, length: int, name: str = "codes") -> np.ndarray:
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
        raise MsQuantError(
            f"{name}: {packed.shape[-1]} bytes along the last axis, expected {expected} "
            f"for {length} codes"
        )
    codes = np.stack([packed & 15, packed >> 4], axis=-1)
    return codes.reshape(*packed.shape[:-1], 2 * expected)[..., :length]
