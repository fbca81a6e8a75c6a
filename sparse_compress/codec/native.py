"""The UNZIP codec in C++, called through ctypes; see ``src/unzip.h``."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ms_quant.native_library import load_library
from sparse_compress.codec.format import CodecError, Mode, tile_error
from sparse_compress.codec.index import Records

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

_ABI = 2
_OK, _BAD_TILE = 0, 1


class _Failure(ctypes.Structure):
    _fields_ = [
        ("tile", ctypes.c_int64),
        ("value", ctypes.c_int64),
        ("engine", ctypes.c_int32),
        ("cause", ctypes.c_int32),
    ]


@lru_cache(maxsize=1)
def load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and the reason why it is not there."""
    library, where = load_library(
        "sparse_compress.codec", "_unzip", "unzip_abi_version", _ABI, "native codec"
    )
    return library, None if library is not None else where


def _library() -> ctypes.CDLL:
    library, problem = load()
    if library is None:
        raise CodecError(f"the native backend was asked for, but: {problem}")
    return library


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def count_bytes(stream: Bytes) -> Ints:
    """How often each byte value occurs, int64 (256,)."""
    counts = np.empty(256, np.int64)
    _library().unzip_count(_pointer(stream), ctypes.c_int64(stream.size), _pointer(counts))
    return counts


def encode_tiles(
    stream: Bytes, tile_sizes: Ints, mode: Mode, dictionary: Bytes, threads: int = 1
) -> tuple[Bytes, Ints, NDArray[np.bool_]]:
    """Code a stream of tiles; see `reference.encode_tiles`."""
    library = _library()
    weight = np.empty(stream.size, np.uint8)
    stored = np.empty(tile_sizes.size, np.int64)
    coded = np.empty(tile_sizes.size, np.uint8)
    status = library.unzip_encode(
        _pointer(stream),
        ctypes.c_int64(stream.size),
        _pointer(tile_sizes),
        ctypes.c_int64(tile_sizes.size),
        ctypes.c_int32(mode.byte),
        _pointer(dictionary),
        ctypes.c_int32(threads),
        _pointer(weight),
        _pointer(stored),
        _pointer(coded),
    )
    if status != _OK:
        raise CodecError(f"the native encoder refused its arguments (status {status})")
    weight.resize(int(stored.sum()), refcheck=False)  # gives back the rest, without a copy
    return weight, stored, coded.astype(np.bool_)


def decode_tiles(
    weight: Bytes, records: Records, tile_sizes: Ints, mode: Mode, threads: int = 1
) -> Bytes:
    """Decode a weight whose index is already checked; see `reference.decode_tiles`."""
    library = _library()
    out = np.empty(int(tile_sizes.sum()), np.uint8)
    coded = records.coded.astype(np.uint8)
    failure = _Failure()
    status = library.unzip_decode(
        _pointer(weight),
        ctypes.c_int64(weight.size),
        _pointer(records.offset),
        _pointer(records.stored),
        _pointer(coded),
        _pointer(tile_sizes),
        ctypes.c_int64(tile_sizes.size),
        ctypes.c_int32(mode.byte),
        ctypes.c_int32(threads),
        _pointer(out),
        ctypes.c_int64(out.size),
        ctypes.byref(failure),
    )
    if status == _BAD_TILE:
        raise tile_error(failure.cause, failure.tile, failure.engine, failure.value)
    if status != _OK:
        raise CodecError(f"the native decoder refused its arguments (status {status})")
    return out
