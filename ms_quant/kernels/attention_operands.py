"""Queries, keys and values as the library is given them, and what is refused before."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from ms_quant.errors import BadArgumentError

MOST_HEAD_SIZE = 1024
MOST_TOKENS = 1 << 24
KINDS = {"float32": 0, "int8": 1, "uint8": 2}


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


class Steps(ctypes.Structure):
    """``MsqSteps`` of ``src/kernels.h``."""

    _fields_ = [(n, ctypes.c_int64) for n in ("batch", "head", "token")]


class Operand(ctypes.Structure):
    """``MsqOperand`` of ``src/kernels.h``."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("steps", Steps),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("kind", ctypes.c_int32),
    ]


def numbers_of(x: np.ndarray | Codes) -> np.ndarray:
    return x.codes if isinstance(x, Codes) else x


def steps_of(x: np.ndarray) -> Steps:
    return Steps(*(stride // x.itemsize for stride in x.strides[:3]))


def at_most_all(block: tuple[int, int]) -> tuple[int, int]:
    """The same block of numbers that the library can hold."""
    return min(block[0], MOST_TOKENS), min(block[1], MOST_TOKENS)


def address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def expect(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise BadArgumentError(f"attention: {name} has shape {found}, expected {expected}")


def check_type(name: str, array: object, types: tuple[type, ...]) -> None:
    expected = " or ".join(np.dtype(each).name for each in types)
    if not isinstance(array, np.ndarray) or array.dtype not in types:
        found = getattr(array, "dtype", type(array).__name__)
        raise BadArgumentError(f"attention: {name} is {found}, expected {expected}")


def check_array(
    name: str,
    array: np.ndarray | None,
    types: tuple[type, ...],
    shape: tuple[int, ...] | None = None,
) -> None:
    """Refuses what the library would read otherwise than it is."""
    if array is None:
        return
    check_type(name, array, types)
    if shape is not None:
        expect(name, array.shape, shape)
    if not array.flags.c_contiguous:
        raise BadArgumentError(f"attention: {name} is not contiguous, expected C order")


def order_rows(order: np.ndarray | None, heads: int, queries: int, keys: int) -> int:
    """How many heads an order is of."""
    if order is None:
        return 1
    check_array("order", order, (np.int64,))
    if queries != keys or order.shape not in ((1, keys), (heads, keys)):
        raise BadArgumentError(
            f"attention: order has shape {order.shape} for {queries} queries and {keys} keys, "
            f"expected (1 or {heads}, tokens) of as many queries as keys"
        )
    seen = np.zeros(order.shape, bool)
    within = bool(((order >= 0) & (order < keys)).all())
    if within:
        np.put_along_axis(seen, order, True, axis=1)
    if not (within and seen.all()):
        raise BadArgumentError("attention: order is no permutation, expected each token once")
    return len(order)


def operand_of(name: str, x: np.ndarray | Codes) -> Operand:
    numbers = numbers_of(x)
    check_type(name, numbers, (np.int8, np.uint8) if isinstance(x, Codes) else (np.float32,))
    if numbers.ndim != 4:
        raise BadArgumentError(
            f"attention: {name} has shape {numbers.shape}, expected (batch, heads, tokens, size)"
        )
    apart = numbers.shape[3] > 1 and numbers.strides[3] != numbers.itemsize
    if numbers.size and (apart or any(s % numbers.itemsize for s in numbers.strides)):
        raise BadArgumentError(
            f"attention: {name} has strides {numbers.strides}, expected the numbers of a token "
            "side by side"
        )
    kind, steps = KINDS[numbers.dtype.name], steps_of(numbers)
    if not isinstance(x, Codes):
        return Operand(x.ctypes.data, steps, None, 1, 1, kind)
    if min(x.block) < 1:
        raise BadArgumentError(
            f"attention: a scale of {name} is of a block of {x.block}, expected 1 or more"
        )
    batch, heads, tokens, size = numbers.shape
    shape = (batch, heads, -(-tokens // x.block[0]), -(-size // x.block[1]))
    check_array(f"the scale of {name}", x.scales, (np.float32,), shape)
    return Operand(numbers.ctypes.data, steps, x.scales.ctypes.data, *at_most_all(x.block), kind)
