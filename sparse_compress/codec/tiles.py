"""Streams of tiles, coded and decoded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparse_compress.codec.backends import get_backend
from sparse_compress.codec.format import (
    ENGINES,
    LOW,
    MODES,
    STORE_GRAIN,
    CodecError,
    Mode,
    check_dictionary,
    check_tile_sizes,
    get_mode,
    rank_counts,
)
from sparse_compress.codec.index import RECORD, Records, last_record, pack_index, unpack_index

BytesLike = bytes | bytearray | memoryview | NDArray[np.int8] | NDArray[np.uint8]
Sizes = int | Sequence[int] | NDArray[np.integer]


def encode_tiles(
    data: BytesLike,
    tile_bytes: Sizes,
    mode: str = "low",
    *,
    dictionary: ArrayLike | None = None,
    init_offset: int = 0,
    backend: str | None = None,
    threads: int = 1,
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Code a stream of tiles.

    The same input gives the same bytes, whatever the backend and the number of threads.

    Args:
        data: the raw tiles, back to back: bytes, or one dimension of int8 or uint8.
        tile_bytes: raw bytes of a tile, the last of which may be shorter; or of every tile, one
            by one. Each is a multiple of 512 up to 32768.
        mode: "low" (W8A8S) or "high" (W16A16S).
        dictionary: distinct byte values by rank, 36 for "low" and 34 for "high". By default the
            most frequent bytes of `data`, the smaller first where they are equally frequent.
        init_offset: where the weight starts in the buffer that the index refers to, in bytes.
        backend: "native", "reference", or None for the fastest one there is.
        threads: how many threads the native backend uses.

    Returns:
        The int8 weight of shape (c,) and the int8 index of shape (8 * tiles,).

    Raises:
        CodecError: when an argument is out of its range or does not fit the others.
    """
    codec, table = get_backend(backend), get_mode(mode)
    raw = as_bytes(data, "data")
    if isinstance(tile_bytes, int | np.integer):
        sizes = _divide(raw.size, int(tile_bytes))
    else:
        sizes = check_tile_sizes(tile_bytes)
    if raw.size != sizes.sum():
        raise CodecError(f"the data has {raw.size} bytes; its tiles add up to {sizes.sum()}")
    if dictionary is None:
        ranked = rank_counts(codec.count_bytes(raw), table.dictionary_size)
    else:
        ranked = check_dictionary(dictionary, table)
    weight, stored, coded = codec.encode_tiles(raw, sizes, table, ranked, threads)
    return weight.view(np.int8), pack_index(stored, coded, init_offset)


def decode_tiles(
    weight: BytesLike,
    index: BytesLike,
    tile_bytes: Sizes,
    *,
    mode: str | None = None,
    init_offset: int = 0,
    backend: str | None = None,
    threads: int = 1,
) -> NDArray[np.uint8]:
    """Undo `encode_tiles`, and refuse whatever breaks the format.

    The input may come from anywhere: nothing is read or written out of bounds, and the output is
    at most eight times the size of `weight`.

    Args:
        weight: (c,) bytes of stored tiles.
        index: (8 * tiles,) bytes.
        tile_bytes: raw bytes of a tile, or of every tile, one by one. Given one number, the last
            tile has as many as it says itself: those stored, or those of its first header.
        mode: "low" or "high", which the tiles must then use; by default, what the first coded
            tile uses.
        init_offset: the value that `weight` was encoded with.
        backend: "native", "reference", or None for the fastest one there is.
        threads: how many threads the native backend uses.

    Returns:
        The raw tiles, back to back: one dimension of uint8.

    Raises:
        CodecError: naming the tile (and the engine) and the reason.
    """
    codec, table = get_backend(backend), None if mode is None else get_mode(mode)
    stored, packed = as_bytes(weight, "weight"), as_bytes(index, "index")
    if isinstance(tile_bytes, int | np.integer):
        sizes = _sizes_of(stored, packed, int(tile_bytes))
    else:
        sizes = check_tile_sizes(tile_bytes)
    records = unpack_index(packed, sizes, stored.size, init_offset)
    return codec.decode_tiles(stored, records, sizes, table or _mode_of(stored, records), threads)


def as_bytes(data: BytesLike, name: str) -> NDArray[np.uint8]:
    """`data` as uint8, without a copy where it is contiguous, or an error that calls it `name`."""
    if isinstance(data, bytes | bytearray | memoryview):
        view = memoryview(data)
        return np.frombuffer(view if view.c_contiguous else view.tobytes(), np.uint8)
    array = np.asarray(data)
    if array.ndim != 1 or array.dtype not in (np.int8, np.uint8):
        raise CodecError(
            f"the {name} is {array.dtype} of shape {array.shape}; expected one dimension of bytes"
        )
    return np.ascontiguousarray(array).view(np.uint8)


def _divide(total: int, tile_bytes: int) -> NDArray[np.int64]:
    """Tiles of `tile_bytes` that add up to `total`, the last of which may be shorter."""
    check_tile_sizes([tile_bytes])
    whole, rest = divmod(total, tile_bytes)
    return check_tile_sizes([tile_bytes] * whole + [rest] * (rest > 0))


def _sizes_of(weight: NDArray[np.uint8], index: NDArray[np.uint8], tile_bytes: int) -> NDArray:
    """As many tiles as the index has records; the last one may be shorter."""
    sizes = check_tile_sizes([tile_bytes] * (index.size // RECORD))
    last = last_record(index)
    if last is None:
        return sizes
    stored, coded = last
    size = stored
    if coded:
        header = weight[weight.size - stored :] if 0 < stored <= weight.size else weight[:0]
        size = int(header[1]) * STORE_GRAIN * ENGINES if header.size else 0
    # A size that no last tile has is a defect, which decoding finds and names.
    if 0 < size < tile_bytes:
        sizes[-1] = size
    return sizes


def _mode_of(weight: NDArray[np.uint8], records: Records) -> Mode:
    """What the first coded tile says; low where none is coded or it says nothing known."""
    first = records.offset[records.coded][:1]
    found = [mode for mode in MODES.values() if first.size and mode.byte == weight[first[0]]]
    return found[0] if found else LOW
