"""Blocks of tokens: their means and their codes, as ms_quant/attention defines them in NumPy."""

from __future__ import annotations

import ctypes
from typing import Literal

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.kernels.attention_operands import (
    KINDS,
    MOST_HEAD_SIZE,
    Codes,
    Operand,
    Steps,
    address,
    at_most_all,
    check_array,
    operand_of,
    order_rows,
)
from ms_quant.kernels.native import call, threads_of


def block_means(
    x: np.ndarray, size: int, order: np.ndarray | None = None, threads: int | None = None
) -> np.ndarray:
    """The mean of each block of ``size`` tokens, with the sums of NumPy where D is above 1.

    Args:
        x: float32 (B, heads, tokens, D), the numbers of a token contiguous.
        order: int64 (tokens,), the token at each place; None for as they come.
        threads: how many are used at most; None for all.

    Returns:
        float32 (B, heads, ceil(tokens / size), D).

    Raises:
        BadArgumentError: an argument has another type, shape or layout.
    """
    operand = operand_of("x", x)
    batch, heads, tokens, columns = x.shape
    check_array("order", order, (np.int64,), (tokens,))
    if size < 1:
        raise BadArgumentError(f"attention: blocks of {size} tokens, expected 1 or more")
    y = np.empty((batch, heads, -(-tokens // size), columns), np.float32)
    call(
        "msq_block_means",
        *(ctypes.byref(operand), batch, heads, tokens, columns, address(order)),
        *(size, y.ctypes.data, threads_of(threads)),
    )
    return y


def quantize_heads(
    x: np.ndarray,
    dtype: Literal["int8", "e4m3"],
    block: tuple[int, int],
    *,
    scales: np.ndarray | None = None,
    order: np.ndarray | None = None,
    threads: int | None = None,
) -> Codes:
    """Codes of queries, keys or values, with a scale for each block of tokens and channels.

    A scale is absmax / 127 of int8 codes, or 1 where that is not a normal number, and absmax / 448
    of e4m3 codes, which are 0 where it is 0. Codes are rounded half to even.

    Args:
        x: float32 (B, heads, tokens, D), finite, the numbers of a token contiguous; D up to 1024.
        dtype: of the codes.
        block: tokens and channels that share a scale; the last ones may be smaller.
        scales: float32 (B, heads, blocks of tokens, blocks of channels) in place of those of x.
        order: int64 (1 or heads, tokens), the token at each place, which codes are stored by; None
            for as they come.
        threads: how many are used at most; None for all.

    Raises:
        BadArgumentError: an argument has another type, shape or layout.
    """
    operand = operand_of("x", x)
    batch, heads, tokens, size = x.shape
    if size > MOST_HEAD_SIZE or min(block) < 1:
        raise BadArgumentError(
            f"attention: blocks of {block} of heads of {size}, expected 1 or more, and heads up to "
            f"{MOST_HEAD_SIZE}"
        )
    shape = (batch, heads, -(-tokens // block[0]), -(-size // block[1]))
    check_array("scales", scales, (np.float32,), shape)
    rows = order_rows(order, heads, tokens, tokens)
    made = np.empty(shape, np.float32) if scales is None else scales
    codes = np.empty(x.shape, np.int8 if dtype == "int8" else np.uint8)
    kind = Operand(None, Steps(), None, *at_most_all(block), KINDS[codes.dtype.name])
    call(
        "msq_quantize_heads",
        *(ctypes.byref(operand), ctypes.byref(kind), *x.shape, address(order), rows),
        *(scales is not None, codes.ctypes.data, made.ctypes.data, threads_of(threads)),
    )
    return Codes(codes, made, block)
