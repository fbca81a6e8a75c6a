"""Block-sparse attention on CPU: softmax(q k^T * scale) v over the keys that a query keeps.

Work and memory follow the kept blocks; nothing has the size of queries times keys. The same
function without a mask is dense attention. docs/kernels.md says how exactly it computes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.kernels.native import call, number_of, threads_of

MOST_HEAD_SIZE = 1024
MOST_TOKENS = 1 << 24
_KINDS = {"float32": 0, "int8": 1, "uint8": 2}


@dataclass(frozen=True)
class Codes:
    """Queries, keys or values as codes with scales; a number is code * scale in float32.

    Where attention has an order, codes are stored in it, as a scale is of neighbours in it.

    Attributes:
        codes: (B, heads, tokens, size), int8, or uint8 codes of e4m3.
        scales: float32 (B, heads, ceil(tokens / block[0]), ceil(size / block[1])).
        block: tokens and channels that share a scale: (1, size) for per token, (tokens, 1) for per
            channel, (tokens, size) for per head.
    """

    codes: np.ndarray
    scales: np.ndarray
    block: tuple[int, int]


class _Steps(ctypes.Structure):
    """``MsqSteps`` of ``src/kernels.h``."""

    _fields_ = [(n, ctypes.c_int64) for n in ("batch", "head", "token")]


class _Operand(ctypes.Structure):
    """``MsqOperand`` of ``src/kernels.h``."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("steps", _Steps),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("kind", ctypes.c_int32),
    ]


class _Attention(ctypes.Structure):
    """``MsqBlockAttention`` of ``src/kernels.h``."""

    _fields_ = [
        *((name, _Operand) for name in "qkv"),
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
        ("y_steps", _Steps),
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

    With an order, blocks, band, ``first`` and ``leading`` count places in it, while q, k, v, padding
    and the result have tokens as they come. Only ``Codes`` are stored by place.

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
        float32 (B, heads, queries, Dv), in memory with the heads of a token side by side if q is so.

    Raises:
        BadArgumentError: an argument has another type, shape or layout.
    """
    operands = {name: _operand(name, x) for name, x in (("q", q), ("k", k), ("v", v))}
    shapes = {name: _numbers(x).shape for name, x in (("q", q), ("k", k), ("v", v))}
    batch, heads, queries, size = shapes["q"]
    keys, value_size = shapes["v"][2:]
    _expect("k", shapes["k"], (batch, heads, keys, size))
    _expect("v", shapes["v"], (batch, heads, shapes["k"][2], value_size))
    for name, found, most in (
        ("the size of a head of q", size, MOST_HEAD_SIZE),
        ("the size of a head of v", value_size, MOST_HEAD_SIZE),
        ("the number of queries", queries, MOST_TOKENS),
        ("the number of keys", keys, MOST_TOKENS),
    ):
        if found > most or (most == MOST_HEAD_SIZE and not found):
            raise BadArgumentError(f"block_attention: {name} is {found}, expected up to {most}")
    shape = _blocks_shape(blocks, block_shape, (batch, heads, queries, keys))
    _array("band", band, (np.int64,), (heads,))
    _array("leading", leading, (np.int64,), (heads,))
    _array("kept", kept, (np.bool_,), (batch, keys))
    rows = _order_rows(order, heads, queries, keys)
    if first < 0:
        raise BadArgumentError(f"block_attention: first is {first}, expected 0 or more")
    factor = size**-0.5 if scale is None else scale
    y = _empty(_numbers(q), value_size)
    task = _Attention(
        *operands.values(),
        *(batch, heads, queries, keys, size, value_size),
        *(_address(order), rows),
        *(_address(blocks), *shape, *_at_most_all(block_shape)),
        *(_address(band), min(first, MOST_TOKENS), _address(leading), _address(kept), factor),
        *(y.ctypes.data, _steps(y)),
    )
    call("msq_block_attention", number_of(isa), ctypes.byref(task), threads_of(threads))
    return y


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
    operand = _operand("x", x)
    batch, heads, tokens, columns = x.shape
    _array("order", order, (np.int64,), (tokens,))
    y = np.empty((batch, heads, -(-tokens // size), columns), np.float32)
    call(
        "msq_block_means",
        *(ctypes.byref(operand), batch, heads, tokens, columns, _address(order)),
        *(size, y.ctypes.data, threads_of(threads)),
    )
    return y


def _numbers(x: np.ndarray | Codes) -> np.ndarray:
    return x.codes if isinstance(x, Codes) else x


def _empty(q: np.ndarray, size: int) -> np.ndarray:
    """(B, heads, queries, size), with the heads of a token side by side if they are so in q."""
    batch, heads, queries, _ = q.shape
    if q.strides[1] < q.strides[2]:
        return np.empty((batch, queries, heads, size), np.float32).transpose(0, 2, 1, 3)
    return np.empty((batch, heads, queries, size), np.float32)


def _steps(x: np.ndarray) -> _Steps:
    return _Steps(*(stride // x.itemsize for stride in x.strides[:3]))


def _at_most_all(block: tuple[int, int]) -> tuple[int, int]:
    """The same block of numbers that the library can hold."""
    return min(block[0], MOST_TOKENS), min(block[1], MOST_TOKENS)


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def _expect(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise BadArgumentError(f"block_attention: {name} has shape {found}, expected {expected}")


def _typed(name: str, array: object, types: tuple[type, ...]) -> None:
    expected = " or ".join(np.dtype(each).name for each in types)
    if not isinstance(array, np.ndarray) or array.dtype not in types:
        found = getattr(array, "dtype", type(array).__name__)
        raise BadArgumentError(f"block_attention: {name} is {found}, expected {expected}")


def _array(
    name: str,
    array: np.ndarray | None,
    types: tuple[type, ...],
    shape: tuple[int, ...] | None = None,
) -> None:
    """Refuses what the library would read otherwise than it is."""
    if array is None:
        return
    _typed(name, array, types)
    if shape is not None:
        _expect(name, array.shape, shape)
    if not array.flags.c_contiguous:
        raise BadArgumentError(f"block_attention: {name} is not contiguous, expected C order")


def _order_rows(order: np.ndarray | None, heads: int, queries: int, keys: int) -> int:
    """How many heads an order is of."""
    if order is None:
        return 1
    _array("order", order, (np.int64,))
    if queries != keys or order.shape not in ((1, keys), (heads, keys)):
        raise BadArgumentError(
            f"block_attention: order has shape {order.shape} for {queries} queries and {keys} keys, "
            f"expected (1 or {heads}, tokens) of as many queries as keys"
        )
    seen = np.zeros(order.shape, bool)
    within = bool(((order >= 0) & (order < keys)).all())
    if within:
        np.put_along_axis(seen, order, True, axis=1)
    if not (within and seen.all()):
        raise BadArgumentError("block_attention: order is no permutation, expected each token once")
    return len(order)


def _operand(name: str, x: np.ndarray | Codes) -> _Operand:
    numbers = _numbers(x)
    _typed(name, numbers, (np.int8, np.uint8) if isinstance(x, Codes) else (np.float32,))
    if numbers.ndim != 4:
        raise BadArgumentError(
            f"block_attention: {name} has shape {numbers.shape}, expected (batch, heads, tokens, "
            "size)"
        )
    if numbers.size and (
        numbers.strides[3] != numbers.itemsize or any(s % numbers.itemsize for s in numbers.strides)
    ):
        raise BadArgumentError(
            f"block_attention: {name} has strides {numbers.strides}, expected the numbers of a token "
            "side by side"
        )
    kind, steps = _KINDS[numbers.dtype.name], _steps(numbers)
    if not isinstance(x, Codes):
        return _Operand(x.ctypes.data, steps, None, 1, 1, kind)
    if min(x.block) < 1:
        raise BadArgumentError(
            f"block_attention: a scale of {name} is of a block of {x.block}, expected 1 or more"
        )
    batch, heads, tokens, size = numbers.shape
    shape = (batch, heads, -(-tokens // x.block[0]), -(-size // x.block[1]))
    _array(f"the scale of {name}", x.scales, (np.float32,), shape)
    return _Operand(numbers.ctypes.data, steps, x.scales.ctypes.data, *_at_most_all(x.block), kind)


def _blocks_shape(
    blocks: np.ndarray | None, block_shape: tuple[int, int], tokens: tuple[int, int, int, int]
) -> tuple[int, int]:
    """Batches and heads of ``blocks``."""
    if min(block_shape) < 1:
        raise BadArgumentError(f"block_attention: block_shape is {block_shape}, expected 1 or more")
    if blocks is None:
        return 1, 1
    _array("blocks", blocks, (np.uint8, np.bool_))
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
            f"block_attention: blocks has shape {blocks.shape}, expected (1 or {batch}, "
            f"1 or {heads}, {down}, {across})"
        )
    return leading[0], leading[1]
