"""Constants of the UNZIP format, its prefix code and its errors: what every backend shares.

The format is described in ``docs/unzip_format.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ms_quant.errors import BadFileError

TILE_GRAIN = 512
MAX_TILE = 32768
ENGINES = 4
CHUNK = 64
BLOCK = 32
STORE_GRAIN = ENGINES * BLOCK
HEADER = 40
WINDOW = 64
WORD_BITS = 64
MAX_CODE = 12
_COUNTED_AT_ONCE = 1 << 22

CODEWORDS = (
    *("000", "001", "010", "011", "100"),
    *(f"101{i:03b}" for i in range(8)),
    *(f"110{i:03b}" for i in range(8)),
    *("111000", "111001"),
    *(f"111010{i:03b}" for i in range(8)),
    *(f"111011{i:03b}" for i in range(7)),
)
"""Bits in stream order; the first bit is the least significant one."""
END = "111011111"
LITERAL = "1111"


class CodecError(BadFileError):
    """A tile stream, an index or an argument that the codec refuses."""


@dataclass(frozen=True)
class Mode:
    """One of the two code tables.

    Attributes:
        byte: first byte of every engine header.
        dictionary_size: how many byte values the header lists.
        meanings: what each of `CODEWORDS` stands for: (repeats, rank in the dictionary), or None
            for the word that is not used.
    """

    name: str
    byte: int
    dictionary_size: int
    meanings: tuple[tuple[int, int] | None, ...]

    @property
    def run_lengths(self) -> list[int]:
        """Repeats of the most frequent byte that have a code of their own."""
        return sorted(m[0] for m in self.meanings if m is not None and m[1] == 0)


LOW = Mode(
    name="low",
    byte=0xA8,
    dictionary_size=36,
    meanings=((1, 0), (2, 0), *((1, rank) for rank in range(1, 36)), None),
)
HIGH = Mode(
    name="high",
    byte=0x88,
    dictionary_size=34,
    meanings=((1, 0), (2, 0), (3, 0), (4, 0), (1, 1), (9, 0), *((1, r) for r in range(2, 34))),
)
MODES = {mode.name: mode for mode in (LOW, HIGH)}


class Cause(IntEnum):
    """Why a coded tile is refused. The values are those of ``src/unzip.h``."""

    UNKNOWN_MODE = 1
    OTHER_MODE = 2
    WRONG_LENGTH = 3
    RESERVED_HEADER = 4
    DICTIONARY_DIFFERS = 5
    STRADDLE = 6
    UNUSED_CODE = 7
    PAST_LENGTH = 8
    PAST_WINDOW = 9
    EARLY_END = 10
    MISSING_END = 11
    PADDING = 12
    CHECKSUM = 13


_MESSAGES = {
    Cause.UNKNOWN_MODE: "unknown mode byte 0x{0:02x}; expected 0xa8 (low) or 0x88 (high)",
    Cause.OTHER_MODE: "mode byte 0x{0:02x} belongs to the other mode than the one asked for",
    Cause.WRONG_LENGTH: "the header gives L = {0} x 128 bytes, which disagrees with the tile",
    Cause.RESERVED_HEADER: "bytes 2 and 3 of a high header are 0x{0:04x}; expected 0",
    Cause.DICTIONARY_DIFFERS: "the dictionary differs from engine 0's at entry {0}",
    Cause.STRADDLE: "a code straddles two words after {0} raw bytes",
    Cause.UNUSED_CODE: "the unused code 111011110 appears after {0} raw bytes",
    Cause.PAST_LENGTH: "a code writes past L after {0} raw bytes",
    Cause.PAST_WINDOW: "a code writes past the 64-byte window of its word after {0} raw bytes",
    Cause.EARLY_END: "END comes before L, after {0} raw bytes",
    Cause.MISSING_END: "END is missing after {0} raw bytes",
    Cause.PADDING: "non-zero padding after {0} raw bytes",
    Cause.CHECKSUM: "checksum mismatch: the decoded bytes give 0x{0:04x} (odd, even XOR)",
}


def tile_error(cause: int, tile: int, engine: int, value: int) -> CodecError:
    """The error of one engine of one tile, worded the same for every backend."""
    return CodecError(f"tile {tile}, engine {engine}: {_MESSAGES[Cause(cause)].format(value)}")


def get_mode(name: str) -> Mode:
    """The `Mode` called `name`."""
    if name not in MODES:
        raise CodecError(f"mode is {name!r}; expected one of {sorted(MODES)}")
    return MODES[name]


def bits_of(codeword: str) -> int:
    """The number whose least significant bit is the first of `codeword`."""
    return int(codeword[::-1], 2)


def rank_counts(counts: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """The `size` most frequent bytes: count descending, then byte value ascending."""
    return np.argsort(-counts, kind="stable")[:size].astype(np.uint8)


def count_bytes(stream: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each byte value occurs, int64 (256,), in an even number of bytes."""
    counts = np.zeros(256, np.int64)
    # bincount widens its input to 8 bytes an element: count pairs, and not all at once.
    for start in range(0, stream.size, _COUNTED_AT_ONCE):
        pairs = stream[start : start + _COUNTED_AT_ONCE].view(np.uint16)
        table = np.bincount(pairs, minlength=1 << 16).reshape(256, 256)
        counts += table.sum(axis=0) + table.sum(axis=1)
    return counts


def check_dictionary(dictionary: ArrayLike, mode: Mode) -> NDArray[np.uint8]:
    """`dictionary` as bytes, or an error when it cannot be coded with."""
    values = np.asarray(dictionary)
    size = mode.dictionary_size
    if values.shape != (size,) or not np.issubdtype(values.dtype, np.integer):
        raise CodecError(
            f"the dictionary is {values.dtype} of shape {values.shape}; "
            f"{mode.name} mode needs {size} integers"
        )
    if values.min() < 0 or values.max() > 255 or np.unique(values).size != size:
        raise CodecError("the dictionary must hold distinct byte values in 0..255")
    return values.astype(np.uint8)


def check_tile_sizes(tile_sizes: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
    """`tile_sizes` as int64, or an error naming the first tile that no tile can be."""
    sizes = np.asarray(tile_sizes)
    if sizes.size == 0:
        sizes = np.zeros(0, np.int64)
    if sizes.ndim != 1 or not np.issubdtype(sizes.dtype, np.integer):
        raise CodecError(
            f"tile sizes are {sizes.dtype} of shape {sizes.shape}; expected a list of integers"
        )
    bad = np.flatnonzero((sizes <= 0) | (sizes > MAX_TILE) | (sizes % TILE_GRAIN != 0))
    if bad.size:
        raise CodecError(
            f"tile {bad[0]}: {sizes[bad[0]]} raw bytes; "
            f"expected a multiple of {TILE_GRAIN} up to {MAX_TILE}"
        )
    return sizes.astype(np.int64)
