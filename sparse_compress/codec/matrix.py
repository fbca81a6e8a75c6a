"""Whole matrices: fractals, tiles, and the info tensor that goes with them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ms_quant.errors import UnsupportedError
from sparse_compress.codec import fractal
from sparse_compress.codec.format import MAX_TILE, CodecError
from sparse_compress.codec.index import RECORD
from sparse_compress.codec.tiles import BytesLike, Sizes, as_bytes, decode_tiles, encode_tiles


class TooLongError(UnsupportedError):
    """A weight codes so badly that the runtimes would refuse it."""


class CompressedMatrix(NamedTuple):
    """An int8 matrix as it is stored.

    Attributes:
        weight: int8 (c,), the tiles back to back.
        index: int8 (8 * tiles,), a record for each.
        info: int64 (5,), see `matrix_info`.
    """

    weight: NDArray[np.int8]
    index: NDArray[np.int8]  # type: ignore[assignment]  # tuples have a method of this name
    info: NDArray[np.int64]


def matrix_info(n: int, k: int) -> NDArray[np.int64]:
    """The info tensor of an (n, k) matrix, for layouts that hold one and callers that need it.

    Args:
        n: output channels.
        k: input channels; of a 16-bit weight viewed as bytes, twice as many.

    Returns:
        int64 (5,): fractals of a tile along k and along n, then k, n and 1.
    """
    return np.array([fractal.TILE, fractal.TILE, k, n, 1], np.int64)


def compress_matrix(
    weight: NDArray[np.int8],
    mode: str = "low",
    *,
    backend: str | None = None,
    threads: int = 1,
) -> CompressedMatrix:
    """Lay an int8 matrix out as fractals and code it.

    Args:
        weight: int8 (n, k), that is (output channels, input channels) of one rank. View a 16-bit
            weight as int8 (n, 2k).
        mode: "low" (W8A8S) or "high" (W16A16S).
        backend: "native", "reference", or None for the fastest one there is.
        threads: how many threads the native backend uses.

    Returns:
        CompressedMatrix, the int8 weight (c,), the int8 index (8 * tiles,), the int64 info (5,).

    Raises:
        MsQuantError: when the shape cannot be laid out.
        TooLongError: when the stored weight would be longer than round16(n) * round32(k), which
            the runtimes refuse. This only happens when n is not a multiple of 128 and the weight
            hardly compresses.
    """
    stream, sizes = fractal.to_fractal(np.asarray(weight))
    coded, index = encode_tiles(stream, sizes, mode, backend=backend, threads=threads)
    n, k = np.shape(weight)
    most = fractal.most_bytes(n, k)
    if coded.size > most:
        raise TooLongError(
            f"the ({n}, {k}) weight takes {coded.size} bytes compressed; "
            f"the runtimes accept at most {most}: leave it uncompressed"
        )
    return CompressedMatrix(coded, index, matrix_info(n, k))


def decompress_matrix(
    weight: BytesLike,
    index: BytesLike,
    info: ArrayLike,
    mode: str | None = None,
    *,
    backend: str | None = None,
    threads: int = 1,
) -> NDArray[np.int8]:
    """Undo `compress_matrix`: ``decompress_matrix(*compressed)``.

    Args:
        weight: (c,) bytes of stored tiles.
        index: (8 * tiles,) bytes.
        info: int64 (5,); where a layout holds none, ``matrix_info(n, k)``.
        mode: "low" or "high", which the tiles must then use; by default, what the first coded
            tile uses.
        backend: "native", "reference", or None for the fastest one there is.
        threads: how many threads the native backend uses.

    Returns:
        The int8 (n, k) matrix.

    Raises:
        MsQuantError: when the shape cannot be laid out.
        CodecError: when info, index or a tile is wrong, naming the tile and the reason.
    """
    packed = as_bytes(index, "index")
    n, k = matrix_shape(info, packed.size)
    sizes = fractal.tile_sizes(n, k)
    stream = decode_tiles(weight, packed, sizes, mode=mode, backend=backend, threads=threads)
    return fractal.from_fractal(stream, n, k)


def matrix_shape(info: ArrayLike, index_bytes: int) -> tuple[int, int]:
    """(n, k) of a stored matrix. An absurd shape, as a file may state, is found without making it.

    Args:
        info: int64 (5,).
        index_bytes: bytes of the index.

    Raises:
        MsQuantError: info is malformed, or does not agree with the index.
    """
    n, k = _shape(info)
    expected = RECORD * fractal.tile_count(n, k)
    if index_bytes != expected:
        raise CodecError(f"the index has {index_bytes} bytes; a ({n}, {k}) weight takes {expected}")
    return n, k


def encoded_size(
    data: BytesLike | NDArray[np.int8],
    mode: str = "low",
    *,
    tile_bytes: Sizes = MAX_TILE,
    dictionary: ArrayLike | None = None,
    backend: str | None = None,
    threads: int = 1,
) -> int:
    """The bytes that data takes when it is stored, without those of the index, 8 a tile.

    Exact, with bypassed tiles and all padding. `price` is the cheap way when only counts are
    known.

    Args:
        data: an int8 matrix (n, k), laid out as `compress_matrix` does but of any length; or the
            raw tiles, back to back, as `encode_tiles` takes them.
        mode: "low" (W8A8S) or "high" (W16A16S).
        tile_bytes: as `encode_tiles` takes it; a matrix has tiles of its own.
        dictionary: as `encode_tiles` takes it.
        backend: "native", "reference", or None for the fastest one there is.
        threads: how many threads the native backend uses.

    Returns:
        The length c of the stored weight.

    Raises:
        MsQuantError: when an argument is one that `encode_tiles` refuses, or a matrix cannot be
            laid out.
    """
    if isinstance(data, np.ndarray) and data.ndim == 2:
        data, tile_bytes = fractal.to_fractal(np.asarray(data))
    weight, _ = encode_tiles(
        data, tile_bytes, mode, dictionary=dictionary, backend=backend, threads=threads
    )
    return weight.size


def _shape(info: ArrayLike) -> tuple[int, int]:
    """(n, k) of an info tensor that can be ours."""
    values = np.asarray(info)
    if values.shape != (5,) or not np.issubdtype(values.dtype, np.integer):
        raise CodecError(
            f"the info tensor is {values.dtype} of shape {values.shape}; expected 5 integers"
        )
    n, k = int(values[3]), int(values[2])
    found = values.tolist()
    if found != [fractal.TILE, fractal.TILE, k, n, 1]:
        raise CodecError(
            f"the info tensor is {found}; expected [{fractal.TILE}, {fractal.TILE}, k, n, 1]"
        )
    return n, k
