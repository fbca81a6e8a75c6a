"""The C interface of the kernels, called through ctypes; see ``src/kernels.h``."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.native_library import load_library
from ms_quant.numerics.affine import LIMITS

ISAS = {
    "scalar": 0,
    "avx2": 1,
    "avx_vnni": 2,
    "avx512_vnni": 3,
    "neon_dot": 4,
    "neon_i8mm": 5,
    "amx": 6,
}
"""Instruction sets, slowest first, with their numbers in the library."""

FASTEST = "MS_QUANT_ISA"
"""An environment variable: the fastest instruction set that is used; ``none`` is NumPy alone."""

FLOAT, PER_TOKEN, STATIC = range(3)
_ABI = 10
_BEST = -1
_ALIGNMENT, _HUGE_PAGE = 64, 2 << 20
_STATUS = {
    1: "an argument is wrong",
    2: "the packed weight or its parameters are damaged",
    3: "there is not enough memory",
    4: "the weight was packed for an instruction set that this machine has not",
    6: "input_offset differs between channels, expected the same in all",
    7: "a code of the weight is no int4, expected -8..7",
}
NO_ISA, NOT_FINITE = 4, 5
_INPUT_POINTERS = ("mul", "input_scale", "input_factor")
_POINTERS = (*_INPUT_POINTERS, "scale", "row_scale", "zero_point", "int_bias", "bias")
_TYPES = {"zero_point": np.int8, "int_bias": np.int32}


class Linear(ctypes.Structure):
    """``MsqLinear`` of ``src/kernels.h``."""

    _fields_ = [
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("input", ctypes.c_int32),
        ("smallest", ctypes.c_int32),
        ("largest", ctypes.c_int32),
        ("clip", ctypes.c_float),
        ("offset", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


@dataclass(frozen=True)
class Computed:
    """What a linear computes with, besides its codes.

    Attributes:
        shape: of the weight, (out, in).
        arrays: by the names of ``MsqLinear`` in ``src/kernels.h``.
        group: inputs that share a scale.
        input: ``FLOAT``, ``PER_TOKEN`` or ``STATIC``.
        limits: smallest and largest code of the input.
        clip: factor on each token's range.
        offset: zero point of a static input.
    """

    shape: tuple[int, int]
    arrays: Mapping[str, np.ndarray]
    group: int
    input: int
    limits: tuple[int, int] = LIMITS[8]
    clip: float = 1.0
    offset: float = 0.0

    def structure(self) -> Linear:
        """The same for the library; it holds addresses of the arrays, which must stay."""
        for name, array in self.arrays.items():
            assert array.dtype == _TYPES.get(name, np.float32) and array.flags.c_contiguous, name
        pointers = [self.arrays[n].ctypes.data if n in self.arrays else None for n in _POINTERS]
        numbers = (*self.shape, self.group, self.input, *self.limits, self.clip, self.offset)
        return Linear(*numbers, *pointers)


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    fastest = os.environ.get(FASTEST)
    if fastest == "none":
        return None, f"{FASTEST} is none; using the NumPy reference, slower"
    found, where = load_library(
        "ms_quant.kernels", "_kernels", "msq_abi_version", _ABI, "native kernels"
    )
    if found is not None:
        size, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
        found.msq_weights_bytes.argtypes = [number, size, size, number]
        found.msq_weights_bytes.restype = size
        found.msq_params_bytes.argtypes = [pointer]
        found.msq_params_bytes.restype = size
        found.msq_pack_weights.argtypes = [number, pointer, size, size, number, pointer]
        found.msq_pack_params.argtypes = [pointer, pointer]
        found.msq_pages_new.argtypes, found.msq_pages_new.restype = [size], pointer
        found.msq_pages_start.argtypes, found.msq_pages_start.restype = [pointer], pointer
        for name in ("free", "changed", "watch"):
            getattr(found, f"msq_pages_{name}").argtypes = [pointer]
        found.msq_process.restype = ctypes.c_uint64
        found.msq_watched_linear.argtypes = [pointer, number, pointer, size, pointer, number]
        found.msq_linear.argtypes = [pointer, size, pointer, size, pointer, size, pointer, number]
        found.msq_quantize_rows.argtypes = [
            *(number, pointer, size, size, number, number, ctypes.c_float, number),
            *(pointer, pointer, number),
        ]
        found.msq_quantize_stored.argtypes = [
            *(number, pointer, pointer, *(size,) * 3, *(number,) * 3),
            *(pointer, pointer, number),
        ]
        real = ctypes.c_float
        found.msq_rms_norm.argtypes = [number, pointer, pointer, size, size, real, pointer, number]
        found.msq_swiglu.argtypes = [number, pointer, pointer, size, pointer, number]
        found.msq_rope.argtypes = [number, pointer, pointer, pointer, *(size,) * 4, pointer, number]
        found.msq_hadamard.argtypes = [pointer, size, size, size, ctypes.c_double]
        found.msq_softmax.argtypes = [number, pointer, pointer, *(size,) * 4, real, number]
        found.msq_attention.argtypes = [
            *(number, *(pointer,) * 4),
            *(*(size,) * 7, real, pointer, number),
        ]
        found.msq_block_attention.argtypes = [number, pointer, number]
        found.msq_block_means.argtypes = [
            *(pointer, *(size,) * 4, pointer, size, pointer, number),
        ]
        found.msq_quantize_heads.argtypes = [
            *(pointer, pointer, *(size,) * 4, pointer, size, number),
            *(pointer, pointer, number),
        ]
        found.msq_row_products.argtypes = [
            *(number, pointer, number, size, size, pointer, pointer),
            *(size, pointer, number),
        ]
        found.msq_step_attention.argtypes = [number, pointer, number]
        found.msq_rows_alike.argtypes, found.msq_rows_alike.restype = [pointer, size], size
        found.msq_product.argtypes = [
            pointer,
            size,
            *(pointer, size, size),
            *(pointer,) * 2,
            number,
        ]
        found.msq_syrk.argtypes = [pointer, size, size, pointer, number]
        found.msq_column_stats.argtypes = [number, pointer, size, size, *(pointer,) * 4, number]
    if fastest:
        _limit(found, where, fastest)
    return found, where


def _limit(library: ctypes.CDLL | None, where: str, fastest: str) -> None:
    """Leaves the instruction sets up to one, so that tests see what a lesser machine computes."""
    if library is None:
        raise BadArgumentError(f"{FASTEST} is {fastest!r}, but: {where}")
    able = [name for name, number in ISAS.items() if library.msq_has_isa(number)]
    if fastest not in able:
        expected = ", ".join([*able, "none"])
        raise BadArgumentError(
            f"{FASTEST} is {fastest!r}, which is not here, expected one of {expected}"
        )
    library.msq_limit_isa(ISAS[fastest])


def available() -> bool:
    """Whether the library is there."""
    return _load()[0] is not None


def note() -> str | None:
    """One sentence when the library is missing, else None."""
    found, where = _load()
    return where if found is None else None


def library_path() -> str:
    """Where the library lies."""
    _library()
    return _load()[1]


def _library() -> ctypes.CDLL:
    found, where = _load()
    if found is None:
        raise BadArgumentError(f"native kernels were asked for, but: {where}")
    return found


def has_isa(isa: str) -> bool:
    """Whether this machine, and the library as it was built, has an instruction set."""
    return bool(_library().msq_has_isa(ctypes.c_int32(ISAS[isa])))


def best_isa() -> str:
    """The instruction set that is used where none is named."""
    return list(ISAS)[_library().msq_best_isa()]


def number_of(isa: str | None) -> int:
    if isa is None:
        return _BEST
    if isa not in ISAS or not has_isa(isa):
        able = ", ".join(name for name in ISAS if has_isa(name))
        raise BadArgumentError(f"instruction set {isa!r} is not here, expected one of {able}")
    return ISAS[isa]


def threads_of(threads: int | None) -> int:
    """How many threads a call may use: as asked, else as many cores as this process may run on,
    or fewer where ``OMP_NUM_THREADS`` says so."""
    if threads is not None:
        return max(1, threads)
    able = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if able else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(wanted)) if wanted.isdecimal() and int(wanted) else cores


def set_operator_threads(threads: int) -> None:
    """How many threads the custom operator uses from now on, in the whole process."""
    _library().msq_set_threads(ctypes.c_int32(threads))


def blob(count: int) -> np.ndarray:
    """uint8 (count,), aligned as the kernels need it; a large one to huge pages, which NumPy asks
    for: reading them from memory is up to a fifth faster."""
    alignment = _ALIGNMENT if count < _HUGE_PAGE else _HUGE_PAGE
    raw = np.empty(count + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + count]


def call(name: str, *arguments: Any) -> None:
    """Calls a function that returns a status.

    Raises:
        MsQuantError: the status says what is wrong.
    """
    _check(getattr(_library(), name)(*arguments))


def function(name: str) -> Callable[..., Any]:
    """A function that returns something else than a status."""
    return getattr(_library(), name)


def status_of(name: str, *arguments: Any, passed: tuple[int, ...]) -> int:
    """Calls a function that may also return one of some statuses; 0 is well done.

    Raises:
        MsQuantError: another status says what is wrong.
    """
    status = getattr(_library(), name)(*arguments)
    if status not in passed:
        _check(status)
    return status


def _check(status: int) -> None:
    if status:
        raise BadArgumentError(f"native kernels: {_STATUS.get(status, status)}")


def pack_weights(codes: np.ndarray, bits: int, isa: str | None = None) -> np.ndarray:
    """Codes in the layout of an instruction set.

    Args:
        codes: int8 (out, in).
        bits: of a code, 8 or 4.
        isa: a name from ``ISAS``; None for the fastest there is.

    Returns:
        uint8 (bytes,), with a header.
    """
    number = number_of(isa)
    codes = np.ascontiguousarray(codes, np.int8)
    packed = weights_blob(codes.shape, bits, number)
    call("msq_pack_weights", number, codes.ctypes.data, *codes.shape, bits, packed.ctypes.data)
    return packed


def weights_blob(shape: tuple[int, ...], bits: int, isa: int) -> np.ndarray:
    """Room for packed codes of a shape (out, in)."""
    count = _library().msq_weights_bytes(isa, *shape, bits)
    if count < 0:
        raise BadArgumentError(f"native kernels: codes of shape {shape}, expected some of each")
    return blob(count)


def pack_params(computed: Computed) -> np.ndarray:
    """uint8 (bytes,), with a header."""
    held = {
        name: np.ascontiguousarray(array, _TYPES.get(name, np.float32))
        for name, array in computed.arrays.items()
    }
    linear = replace(computed, arrays=held).structure()
    packed = blob(params_bytes(linear))
    _check(_library().msq_pack_params(ctypes.byref(linear), packed.ctypes.data))
    return packed


def params_bytes(linear: Linear) -> int:
    count = _library().msq_params_bytes(ctypes.byref(linear))
    if count < 0:
        shape = linear.outputs, linear.inputs
        raise BadArgumentError(
            f"native kernels: a linear of shape {shape}, groups of {linear.group}: refused"
        )
    return count


def rows_alike(packed: np.ndarray) -> int:
    """How many rows of floats packed codes take at a time without one changing another."""
    return _library().msq_rows_alike(*place_of(packed))


Place = tuple[int, int]
"""The address of packed bytes and how many there are."""


def place_of(packed: np.ndarray) -> Place:
    return packed.ctypes.data, packed.size


def linear(weights: Place, params: Place, x: int, rows: int, y: int, threads: int) -> None:
    """Writes float32 (rows, out) to the address `y`, of float32 (rows, in) at the address `x`."""
    _check(_library().msq_linear(*weights, *params, x, rows, y, threads))


def watched_linear(record: int, decode: bool, x: int, rows: int, y: int, threads: int) -> None:
    """The same of a ``MsqWatchedLinear`` at an address."""
    _check(_library().msq_watched_linear(record, decode, x, rows, y, threads))


def quantize_rows(
    x: np.ndarray,
    bits: int = 8,
    clip: float = 1.0,
    isa: str | None = None,
    threads: int | None = None,
    cleared: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of rows, as :meth:`ms_quant.numerics.activation.PerToken.codes` gives them.

    Args:
        x: float32 (rows, columns), finite.
        bits: 8 or 4.
        clip: factor on each row's range.
        isa: a name from ``ISAS``; None for the fastest there is.
        threads: at most so many; None for all.
        cleared: how many of a scale's last bits are 0, to which it is rounded up: 16 for scales
            of bfloat16.

    Returns:
        int8 (rows, columns) and float32 (rows, 1).
    """
    x = np.ascontiguousarray(x, np.float32)
    codes, scales = np.empty(x.shape, np.int8), np.empty((len(x), 1), np.float32)
    pointers: list[Any] = [x.ctypes.data, *x.shape, *LIMITS[bits], clip, cleared]
    pointers += [codes.ctypes.data, scales.ctypes.data, threads_of(threads)]
    _check(_library().msq_quantize_rows(number_of(isa), *pointers))
    return codes, scales
