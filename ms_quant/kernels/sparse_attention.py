"""Block-sparse attention on CPU: softmax(q k^T * scale) v over the keys that a query keeps.

Work and memory follow the kept blocks; nothing has the size of queries times keys. The same
function without a mask is dense attention. docs/kernels.md says how exactly it computes.
"""

from __future__ import annotations

import ctypes

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.kernels.attention_operands import (
    MOST_HEAD_SIZE,
    MOST_TOKENS,
    Codes,
    Operand,
    Steps,
    address,
    at_most_all,
    check_array,
    expect,
    numbers_of,
    operand_of,
    order_rows,
    steps_of,
)
from ms_quant.kernels.native import call, number_of, threads_of


class _Attention(ctypes.Structure):
    """``MsqBlockAttention`` of ``src/kernels.h``."""

    _fields_ = [
        *((name, Operand) for name in "qkv"),
        *((n, ctypes.c_int64) for n in ("batch", "heads", "queries", "keys", "size", "value_size")),
        ("order", ctypes.c_void_p),
        ("order_heads", ctypes.c_int64),
        ("blocks", ctypes.c_void_p),
        *((f"block_{n}", ctypes.c_int64) for n in ("batches", "heads", "queries", "keys")),
        ("band", ctypes.c_void_p),
        ("first", ctypes.c_int64),
        ("leading", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("y", ctypes.c_void_p),
        ("y_steps", Steps),
    ]


def block_attention(
    q: np.ndarray | Codes,
    k: np.ndarray | Codes,
    v: np.ndarray | Codes,
    *,
    scale: float | None = None,
    blocks: np.ndarray | None = None,
    block_shape: tuple[int, int] = (128, 128),
    band: np.ndarray | None = None,
    first: int = 0,
    leading: np.ndarray | None = None,
    order: np.ndarray | None = None,
    kept: np.ndarray | None = None,
    threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:
    """softmax(q k^T * scale) v over the pairs of tokens that blocks, band and padding all keep.

    A query that keeps no key has zeros. Where q and k are both int8 with scales for the same
    channels, their products are sums of bytes, exact, and then multiplied by scales; other codes
    become floats, piece by piece. Results do not depend on the number of threads. NaN and
    infinities go through as IEEE has them, also 0 times infinity of a value that a band hides
    within a block; a score below -1e29 has no weight.

    With an order, blocks, band, ``first`` and ``leading`` count places in it, while q, k, v,
    padding and the result have tokens as they come. Only ``Codes`` are stored by place.

    Args:
        q: float32 (B, heads, queries, D), or ``Codes`` of that shape; D up to 1024. Any strides,
            as long as the numbers of a token are contiguous.
        k: the same of (B, heads, keys, D).
        v: the same of (B, heads, keys, Dv).
        scale: factor on the scores; 1 / sqrt(D) when None.
        blocks: uint8 or bool (1 or B, 1 or heads, blocks of queries, blocks of keys), not 0 where
            pairs are kept; None keeps all.
        block_shape: queries and keys of a block; the last ones may be smaller.
        band: int64 (heads,), the distance up to which a query keeps keys; -1 for any.
        first: so many tokens are kept beside every band, as keys and as queries.
        leading: int64 (heads,): queries after the first see so many keys only; -1 for all.
        order: int64 (1 or heads, tokens), the token at each place; of as many queries as keys.
        kept: bool (B, keys), False for padding.
        threads: how many are used at most; None for all.
        isa: a name from ``ISAS``; None for the fastest there is.

    Returns:
        float32 (B, heads, queries, Dv); the heads of a token lie side by side if those of q do.

    Raises:
        BadArgumentError: an argument has another type, shape or layout.
    """
    operands = {name: operand_of(name, x) for name, x in (("q", q), ("k", k), ("v", v))}
    shapes = {name: numbers_of(x).shape for name, x in (("q", q), ("k", k), ("v", v))}
    batch, heads, queries, size = shapes["q"]
    keys, value_size = shapes["v"][2:]
    expect("k", shapes["k"], (batch, heads, keys, size))
    expect("v", shapes["v"], (batch, heads, shapes["k"][2], value_size))
    for name, found, most in (
        ("the size of a head of q", size, MOST_HEAD_SIZE),
        ("the size of a head of v", value_size, MOST_HEAD_SIZE),
        ("the number of queries", queries, MOST_TOKENS),
        ("the number of keys", keys, MOST_TOKENS),
    ):
        if found > most or (most == MOST_HEAD_SIZE and not found):
            raise BadArgumentError(f"attention: {name} is {found}, expected up to {most}")
    shape = _blocks_shape(blocks, block_shape, (batch, heads, queries, keys))
    check_array("band", band, (np.int64,), (heads,))
    check_array("leading", leading, (np.int64,), (heads,))
    check_array("kept", kept, (np.bool_,), (batch, keys))
    rows = order_rows(order, heads, queries, keys)
    if first < 0:
        raise BadArgumentError(f"attention: first is {first}, expected 0 or more")
    factor = size**-0.5 if scale is None else scale
    y = _empty(numbers_of(q), value_size)
    task = _Attention(
        *operands.values(),
        *(batch, heads, queries, keys, size, value_size),
        *(address(order), rows),
        *(address(blocks), *shape, *at_most_all(block_shape)),
        *(address(band), min(first, MOST_TOKENS), address(leading), address(kept), factor),
        *(y.ctypes.data, steps_of(y)),
    )
    call("msq_block_attention", number_of(isa), ctypes.byref(task), threads_of(threads))
    return y


def _empty(q: np.ndarray, size: int) -> np.ndarray:
    """(B, heads, queries, size), with the heads of a token side by side if they are so in q."""
    batch, heads, queries, _ = q.shape
    if q.strides[1] < q.strides[2]:
        return np.empty((batch, queries, heads, size), np.float32).transpose(0, 2, 1, 3)
    return np.empty((batch, heads, queries, size), np.float32)


def _blocks_shape(
    blocks: np.ndarray | None, block_shape: tuple[int, int], tokens: tuple[int, int, int, int]
) -> tuple[int, int]:
    """Batches and heads of ``blocks``."""
    if min(block_shape) < 1:
        raise BadArgumentError(f"attention: block_shape is {block_shape}, expected 1 or more")
    if blocks is None:
        return 1, 1
    check_array("blocks", blocks, (np.uint8, np.bool_))
    batch, heads, queries, keys = tokens
    down, across = -(-queries // block_shape[0]), -(-keys // block_shape[1])
    leading = blocks.shape[:2]
    if (
        blocks.ndim != 4
        or blocks.shape[2:] != (down, across)
        or leading[0] not in (1, batch)
        or leading[1] not in (1, heads)
    ):
        raise BadArgumentError(
            f"attention: blocks has shape {blocks.shape}, expected (1 or {batch}, "
            f"1 or {heads}, {down}, {across})"
        )
    return leading[0], leading[1]
