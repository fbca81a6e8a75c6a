"""The UNZIP codec: int8 weights as the Atlas 300I Duo (Ascend 310P) stores them.

Two backends give the same bytes and the same errors: ``native`` (C++) and ``reference`` (NumPy).
The format is described in ``docs/unzip_format.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ms_quant.errors import MsQuantError
from sparse_compress import fractal
from sparse_compress.codec import native, reference
from sparse_compress.codec.format import (
    CodecError,
    check_dictionary,
    check_tile_sizes,
    get_mode,
    rank_counts,
)
from sparse_compress.codec.index import RECORD, pack_index, unpack_index

__all__ = [
    "CodecError",
    "backend_name",
    "backend_note",
    "compress_matrix",
    "decode",
    "decompress_matrix",
    "encode",
]

Sizes = Sequence[int] | NDArray[np.integer]


def backend_name(backend: str | None = None) -> str:
    """Tell which backend a call would use.

    Args:
        backend: "native", "reference", or None for the fastest one there is.

    Returns:
        "native" or "reference".

    Raises:
        CodecError: when `backend` is neither, or is "native" and the library is not there.
    """
    if backend not in (None, "native", "reference"):
        raise CodecError(f"backend is {backend!r}; expected 'native', 'reference' or None")
    library, problem = native.load()
    if backend == "native" and library is None:
        raise CodecError(f"the native backend was asked for, but: {problem}")
    return backend or ("reference" if library is None else "native")


def backend_note() -> str | None:
    """Tell the user why coding is slow.

    Returns:
        One sentence when the native codec is missing, else None.
    """
    return native.load()[1]


def _backend(name: str | None) -> ModuleType:
    return native if backend_name(name) == "native" else reference


def encode(
    stream: NDArray[np.uint8],
    tile_sizes: Sizes,
    mode: str = "low",
    init_offset: int = 0,
    dictionary: ArrayLike | None = None,
    backend: str | None = None,
    threads: int = 1,
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Code a stream of tiles.

    The same input gives the same bytes, whatever the backend and the number of threads.

    Args:
        stream: uint8 array of the raw tiles, back to back.
        tile_sizes: raw bytes of every tile, each a multiple of 512 up to 32768.
        mode: "low" (W8A8S) or "high" (W16A16S).
        init_offset: where the weight starts in the buffer that the index refers to, in bytes.
        dictionary: distinct byte values by rank, 36 for "low" and 34 for "high". By default the
            most frequent bytes of `stream`, the smaller first where they are equally frequent.
        backend: "native", "reference", or None for the fastest one there is.
        threads: how many threads the native backend uses.

    Returns:
        The int8 weight of shape (c,) and the int8 index of shape (8 * tiles,).

    Raises:
        CodecError: when an argument is out of its range or does not fit the others.
    """
    codec, table = _backend(backend), get_mode(mode)
    sizes = check_tile_sizes(tile_sizes)
    raw = _bytes(stream, "stream")
    if raw.size != sizes.sum():
        raise CodecError(f"the stream has {raw.size} bytes; its tiles add up to {sizes.sum()}")
    if dictionary is None:
        ranked = rank_counts(codec.count_bytes(raw), table.dictionary_size)
    else:
        ranked = check_dictionary(dictionary, table)
    weight, stored, coded = codec.encode_tiles(raw, sizes, table, ranked, threads)
    return weight.view(np.int8), pack_index(stored, coded, init_offset)


def decode(
    weight: NDArray[np.int8],
    index: NDArray[np.int8],
    tile_sizes: Sizes,
    mode: str = "low",
    init_offset: int = 0,
    backend: str | None = None,
    threads: int = 1,
) -> NDArray[np.uint8]:
    """Undo `encode`, and refuse whatever breaks the format.

    The input may come from anywhere: nothing is read or written out of bounds, and the output is
    at most eight times the size of `weight`.

    Args:
        weight: int8 (c,) of stored tiles.
        index: int8 (8 * tiles,).
        tile_sizes: raw bytes of every tile.
        mode: "low" or "high"; the tiles must agree.
        init_offset: the value that `weight` was encoded with.
        backend: "native", "reference", or None for the fastest one there is.
        threads: how many threads the native backend uses.

    Returns:
        The uint8 stream of raw tiles.

    Raises:
        CodecError: naming the tile (and the engine) and the reason.
    """
    codec, table = _backend(backend), get_mode(mode)
    sizes = check_tile_sizes(tile_sizes)
    data, records_data = _bytes(weight, "weight"), _bytes(index, "index")
    records = unpack_index(records_data, sizes, data.size, init_offset)
    return codec.decode_tiles(data, records, sizes, table, threads)


def compress_matrix(
    weight: NDArray[np.int8],
    mode: str = "low",
    backend: str | None = None,
    threads: int = 1,
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Lay an int8 matrix out as fractals and code it.

    Args:
        weight: int8 (n, k), that is (output channels, input channels) of one rank.
        mode: "low" (W8A8S) or "high" (W16A16S).
        backend: "native", "reference", or None for the fastest one there is.
        threads: how many threads the native backend uses.

    Returns:
        The int8 weight of shape (c,) and the int8 index of shape (8 * tiles,).

    Raises:
        MsQuantError: when the shape cannot be laid out, or when the stored weight would be longer
            than round16(n) * round32(k), which the runtimes refuse. The latter only happens when
            n is not a multiple of 128 and the weight hardly compresses.
    """
    stream, sizes = fractal.to_fractal(weight)
    coded, index = encode(stream, sizes, mode, backend=backend, threads=threads)
    n, k = weight.shape
    most = -(-n // fractal.ROWS) * fractal.ROWS * (-(-k // fractal.COLUMNS) * fractal.COLUMNS)
    if coded.size > most:
        raise MsQuantError(
            f"the ({n}, {k}) weight takes {coded.size} bytes compressed; "
            f"the runtimes accept at most {most}: leave it uncompressed"
        )
    return coded, index


def decompress_matrix(
    weight: NDArray[np.int8],
    index: NDArray[np.int8],
    n: int,
    k: int,
    mode: str = "low",
    backend: str | None = None,
    threads: int = 1,
) -> NDArray[np.int8]:
    """Undo `compress_matrix`.

    Args:
        weight: int8 (c,) of stored tiles.
        index: int8 (8 * tiles,).
        n: output channels of the matrix.
        k: input channels of the matrix.
        mode: "low" or "high"; the tiles must agree.
        backend: "native", "reference", or None for the fastest one there is.
        threads: how many threads the native backend uses.

    Returns:
        The int8 (n, k) matrix.

    Raises:
        MsQuantError: when the shape cannot be laid out.
        CodecError: when the index or a tile is malformed, naming the tile and the reason.
    """
    # Before anything of size n x k is made: a shape read from a file may be absurd.
    tiles = fractal.tile_count(n, k)
    if index.size != RECORD * tiles:
        raise CodecError(
            f"the index has {index.size} bytes; a ({n}, {k}) weight takes {RECORD * tiles}"
        )
    sizes = fractal.tile_sizes(n, k)
    stream = decode(weight, index, sizes, mode, backend=backend, threads=threads)
    return fractal.from_fractal(stream, n, k)


def _bytes(array: NDArray, name: str) -> NDArray[np.uint8]:
    if array.ndim != 1 or array.dtype not in (np.int8, np.uint8):
        raise CodecError(
            f"the {name} is {array.dtype} of shape {array.shape}; expected one dimension of bytes"
        )
    return np.ascontiguousarray(array).view(np.uint8)
