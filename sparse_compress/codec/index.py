"""The index: one 8-byte record for every tile."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparse_compress.codec.format import (
    BLOCK,
    ENGINES,
    HEADER,
    STORE_GRAIN,
    WINDOW,
    CodecError,
)

RECORD = 8
_LENGTH_BITS = 0x1FF
_FLAG_BITS = 0x7E00
_CODED_BIT = 0x8000
_RESERVED_BITS = 0xFFFF0000


class Records(NamedTuple):
    """The index as arrays, one entry for every tile.

    Attributes:
        offset: byte position of the stored tile in the weight, int64.
        stored: bytes of the stored tile, int64.
        coded: whether the tile is coded (True) or stored raw (False), bool.
    """

    offset: NDArray[np.int64]
    stored: NDArray[np.int64]
    coded: NDArray[np.bool_]


def base_units(init_offset: int) -> int:
    """`init_offset` in units of 128 bytes, rounded up."""
    if not 0 <= init_offset < (1 << 32) * STORE_GRAIN:
        raise CodecError(f"init_offset is {init_offset}; expected 0 up to 2**39 - 1")
    return -(-init_offset // STORE_GRAIN)


def pack_index(
    stored: NDArray[np.int64], coded: NDArray[np.bool_], init_offset: int
) -> NDArray[np.int8]:
    """The index of tiles that lie back to back.

    Args:
        stored: bytes of every stored tile, multiples of 128.
        coded: which tiles are coded.
        init_offset: where the weight starts in the buffer that the offsets refer to, in bytes.

    Returns:
        int8 array of 8 bytes a tile.

    Raises:
        CodecError: when an offset does not fit its 32 bits.
    """
    units = stored // STORE_GRAIN
    offset = np.cumsum(units) - units + base_units(init_offset)
    if offset.size and offset[-1] >> 32:
        raise CodecError(
            f"the last tile starts at {offset[-1]} x 128 bytes; an index record holds 32 bits"
        )
    records = np.empty((stored.size, 2), "<u4")
    records[:, 0] = units | np.where(coded, _CODED_BIT, 0)
    records[:, 1] = offset
    return records.reshape(-1).view(np.int8)


def shortest_coded(tile_sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The least a coded tile can take: every word coding a full window."""
    words = -(-(tile_sizes // ENGINES) // WINDOW)
    engine = HEADER + words * 8
    return -(-engine // BLOCK) * STORE_GRAIN


def last_record(index: NDArray[np.uint8]) -> tuple[int, bool] | None:
    """(stored bytes, coded) of the last tile as an unchecked index gives them; None without one."""
    if index.size < RECORD or index.size % RECORD:
        return None
    fields = int(index[-RECORD:].view("<u4")[0])
    return (fields & _LENGTH_BITS) * STORE_GRAIN, bool(fields & _CODED_BIT)


def unpack_index(
    index: NDArray[np.uint8],
    tile_sizes: NDArray[np.int64],
    weight_bytes: int,
    init_offset: int,
) -> Records:
    """Read and check the index of a weight.

    Args:
        index: bytes of the index, 8 a tile.
        tile_sizes: raw bytes of every tile.
        weight_bytes: bytes of the stored weight.
        init_offset: the value that the index was written with.

    Returns:
        Records whose tiles lie back to back and cover the weight exactly.

    Raises:
        CodecError: naming the first tile that breaks a rule, and the rule.
    """
    if index.size != RECORD * tile_sizes.size:
        raise CodecError(
            f"the index has {index.size} bytes; expected {RECORD} for each of "
            f"{tile_sizes.size} tiles"
        )
    raw = index.view("<u4").reshape(-1, 2).astype(np.int64)
    fields = raw[:, 0]
    stored = (fields & _LENGTH_BITS) * STORE_GRAIN
    coded = (fields & _CODED_BIT) != 0
    offset = (raw[:, 1] - base_units(init_offset)) * STORE_GRAIN
    _check_fields(fields, stored, coded, tile_sizes)
    _check_places(offset, stored, weight_bytes)
    return Records(offset, stored, coded)


def _refuse(bad: NDArray[np.bool_], message: str, *values: NDArray[np.int64]) -> None:
    tiles = np.flatnonzero(bad)
    if tiles.size:
        tile = tiles[0]
        raise CodecError(f"tile {tile}: " + message.format(*(v[tile] for v in values)))


def _check_fields(
    fields: NDArray[np.int64],
    stored: NDArray[np.int64],
    coded: NDArray[np.bool_],
    tile_sizes: NDArray[np.int64],
) -> None:
    _refuse((fields & _RESERVED_BITS) != 0, "the index record sets a reserved bit")
    _refuse((fields & _FLAG_BITS) != 0, "the index record sets a flag")
    _refuse(
        ~coded & (stored != tile_sizes),
        "stored raw in {} bytes; expected the {} of the tile",
        stored,
        tile_sizes,
    )
    _refuse(
        coded & (stored > tile_sizes),
        "coded in {} bytes, more than the {} of the tile",
        stored,
        tile_sizes,
    )
    shortest = shortest_coded(tile_sizes)
    _refuse(
        coded & (stored < shortest),
        "coded in {} bytes; a tile of this size takes at least {}",
        stored,
        shortest,
    )


def _check_places(offset: NDArray[np.int64], stored: NDArray[np.int64], weight_bytes: int) -> None:
    ends = np.cumsum(stored)
    _refuse(
        (offset < 0) | (offset >= weight_bytes),
        f"the index record points to byte {{}}, outside the weight of {weight_bytes} bytes",
        offset,
    )
    _refuse(
        offset + stored > weight_bytes,
        f"the weight is truncated: the tile ends at byte {{}} of {weight_bytes}",
        offset + stored,
    )
    expected = ends - stored
    message = "the index record points to byte {}, but the tiles before it end at {}: "
    wrong = offset != expected
    if wrong.any():
        first = wrong.argmax()
        message += "they overlap" if offset[first] < expected[first] else "there is a gap"
    _refuse(wrong, message, offset, expected)
    total = int(ends[-1]) if ends.size else 0
    if weight_bytes != total:
        raise CodecError(f"{weight_bytes - total} trailing bytes of the weight belong to no tile")
