"""The UNZIP codec in NumPy: the definition that the native codec matches bit for bit.

The engines of many tiles advance together, one code at a time. A *lane* is one engine of one
tile: a row of the arrays below, where a mask tells which lanes still take part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sparse_compress.codec.format import (
    BLOCK,
    CHUNK,
    CODEWORDS,
    END,
    ENGINES,
    HEADER,
    LITERAL,
    LOW,
    MAX_CODE,
    MODES,
    WINDOW,
    WORD_BITS,
    Cause,
    Mode,
    bits_of,
    count_bytes,
    tile_error,
)
from sparse_compress.codec.index import Records

__all__ = ["count_bytes", "decode_tiles", "encode_tiles"]

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Words = NDArray[np.uint64]

_BATCH = 1024
_ONES = np.uint64(2**64 - 1)
_NONE = np.uint64(0)
_END_BITS = np.uint64(bits_of(END))
_END_LENGTH = len(END)
_MOST_CODES = WORD_BITS // 3
_LONGEST_FILL = 10
_LITERALS = 64
"""Symbol of the literal byte 0; smaller symbols are ranks in the dictionary."""
_NOTHING = 255
"""What the unused code is said to repeat in the decoding table."""


def encode_tiles(
    stream: Bytes, tile_sizes: Ints, mode: Mode, dictionary: Bytes, threads: int = 1
) -> tuple[Bytes, Ints, Bools]:
    """Code a stream of tiles.

    Args:
        stream: the raw tiles, back to back.
        tile_sizes: raw bytes of every tile, already checked.
        mode: the code table to use.
        dictionary: byte values by rank.
        threads: taken for the native codec's sake, not used.

    Returns:
        The stored tiles back to back, the bytes of each, and which of them are coded.
    """
    stored = np.zeros(tile_sizes.size, np.int64)
    coded = np.zeros(tile_sizes.size, np.bool_)
    pieces = [np.zeros(0, np.uint8)] * tile_sizes.size
    starts = np.cumsum(tile_sizes) - tile_sizes
    for tiles in _batches(tile_sizes):
        size = int(tile_sizes[tiles[0]])
        engines = _split(stream[starts[tiles][:, None] + np.arange(size)])
        words, counts = _encode_lanes(engines.reshape(-1, size // ENGINES), mode, dictionary)
        counts = counts.reshape(-1, ENGINES)
        fits = counts.all(axis=1)
        longest = _round_up(HEADER + 8 * counts.max(axis=1), BLOCK)
        longest[~fits] = size // ENGINES
        payload = words.astype("<u8").view(np.uint8).reshape(tiles.size, ENGINES, -1)
        streams = np.concatenate([_headers(engines, mode, dictionary), payload], axis=2)
        for row, tile in enumerate(tiles):
            source = streams[row] if fits[row] else engines[row]
            pieces[tile] = _interleave(source[:, : longest[row]])
        stored[tiles], coded[tiles] = longest * ENGINES, fits
    return np.concatenate([np.zeros(0, np.uint8), *pieces]), stored, coded


def decode_tiles(
    weight: Bytes, records: Records, tile_sizes: Ints, mode: Mode, threads: int = 1
) -> Bytes:
    """Decode a weight whose index is already checked.

    Args:
        weight: the stored tiles.
        records: where each of them lies.
        tile_sizes: raw bytes of every tile, already checked.
        mode: the code table that the tiles must use.
        threads: taken for the native codec's sake, not used.

    Returns:
        The raw tiles, back to back.

    Raises:
        CodecError: naming the first bad engine of the first bad tile, and the reason.
    """
    out = np.empty(int(tile_sizes.sum()), np.uint8)
    starts = np.cumsum(tile_sizes) - tile_sizes
    failures: list[tuple[int, int, int, int]] = []
    for tiles in _batches(tile_sizes * 2 + records.coded):
        size, stored = int(tile_sizes[tiles[0]]), records.stored[tiles]
        engines = np.zeros((tiles.size, ENGINES, int(stored.max()) // ENGINES), np.uint8)
        for row, tile in enumerate(tiles):
            piece = weight[records.offset[tile] :][: stored[row]]
            engines[row, :, : stored[row] // ENGINES] = _deinterleave(piece)
        if records.coded[tiles[0]]:
            lanes = _decode_lanes(engines, stored // ENGINES, size // ENGINES, mode)
            failures += lanes.failures(tiles)
            engines = lanes.out.reshape(tiles.size, ENGINES, -1)
        out[starts[tiles][:, None] + np.arange(size)] = _join(engines)
    if failures:
        tile, engine, cause, value = min(failures)
        raise tile_error(cause, tile, engine, value)
    return out


def _batches(keys: Ints) -> list[Ints]:
    """Tile numbers whose keys are the same, a bounded number at a time."""
    groups = [np.flatnonzero(keys == key) for key in np.unique(keys)]
    return [group[i : i + _BATCH] for group in groups for i in range(0, group.size, _BATCH)]


def _round_up(values: Ints, unit: int) -> Ints:
    return -(-values // unit) * unit


def _split(tiles: Bytes) -> Bytes:
    """Deal the 64-byte chunks of (tiles, T) to the engines: (tiles, 4, T/4)."""
    count, size = tiles.shape
    dealt = tiles.reshape(count, -1, ENGINES, CHUNK).swapaxes(1, 2)
    return dealt.reshape(count, ENGINES, size // ENGINES)


def _join(engines: Bytes) -> Bytes:
    """Undo `_split`."""
    count, _, size = engines.shape
    return engines.reshape(count, ENGINES, -1, CHUNK).swapaxes(1, 2).reshape(count, ENGINES * size)


def _interleave(engines: Bytes) -> Bytes:
    """(4, bytes) as e0 b0, e1 b0, e2 b0, e3 b0, e0 b1, ... in blocks of 32 bytes."""
    return engines.reshape(ENGINES, -1, BLOCK).swapaxes(0, 1).reshape(-1)


def _deinterleave(piece: Bytes) -> Bytes:
    """Undo `_interleave`."""
    return piece.reshape(-1, ENGINES, BLOCK).swapaxes(0, 1).reshape(ENGINES, -1)


def _checksums(raw: Bytes) -> tuple[Bytes, Bytes]:
    """XOR of the bytes at odd and at even positions of the last axis."""
    odd, even = raw[..., 1::2], raw[..., 0::2]
    return np.bitwise_xor.reduce(odd, axis=-1), np.bitwise_xor.reduce(even, axis=-1)


def _headers(engines: Bytes, mode: Mode, dictionary: Bytes) -> Bytes:
    """The 40-byte headers of (tiles, 4, L) raw bytes."""
    headers = np.zeros((*engines.shape[:2], HEADER), np.uint8)
    headers[..., 0] = mode.byte
    headers[..., 1] = engines.shape[2] // 128
    headers[..., 4], headers[..., 5] = _checksums(engines)
    early = mode.dictionary_size - 34
    headers[..., 2 : 2 + early] = dictionary[:early]
    headers[..., 6:] = dictionary[early:]
    return headers


def _encode_tables(mode: Mode, dictionary: Bytes) -> tuple[Words, Ints, Words, Ints]:
    """Code and its length for every byte value, then for every run of the first byte."""
    texts = [LITERAL + f"{byte:08b}" for byte in range(256)]
    run_texts = [""] * (max(mode.run_lengths) + 1)
    for codeword, meaning in zip(CODEWORDS, mode.meanings, strict=True):
        if meaning is None:
            continue
        repeats, rank = meaning
        if rank == 0:
            run_texts[repeats] = codeword
        else:
            texts[dictionary[rank]] = codeword
    codes, run_codes = (
        np.array([bits_of(t) if t else 0 for t in ts], np.uint64) for ts in (texts, run_texts)
    )
    lengths, run_lengths = (np.array([len(t) for t in ts]) for ts in (texts, run_texts))
    return codes, lengths, run_codes, run_lengths


def _count_runs(first: Bools, most: int) -> Bytes:
    """How often the first byte of the dictionary follows from each position on, up to `most`."""
    runs = first.astype(np.uint8)
    for _ in range(most - 1):
        runs[:, :-1] = np.where(first[:, :-1], 1 + runs[:, 1:], 0)
    return runs


def _encode_lanes(raw: Bytes, mode: Mode, dictionary: Bytes) -> tuple[Words, Ints]:
    """Code (lanes, L) raw bytes.

    Returns:
        The words of every lane and their number, which is 0 where they would not fit in L.
    """
    lanes, size = raw.shape
    codes, lengths, run_codes, run_lengths = _encode_tables(mode, dictionary)
    long_run = max(mode.run_lengths)
    short_run = max(n for n in mode.run_lengths if run_lengths[n] == 3)
    # One spare column: a lane at its end reads there, and the mask then drops what it read.
    padded = np.pad(raw, ((0, 0), (0, 1))).reshape(-1)
    runs = np.pad(_count_runs(raw == dictionary[0], long_run), ((0, 0), (0, 1))).reshape(-1)
    words = np.zeros((lanes, (size - HEADER) // 8), np.uint64)
    counts = np.zeros(lanes, np.int64)
    position = np.zeros(lanes, np.int64)
    for number in range(words.shape[1]):
        lane = np.flatnonzero(counts == 0)
        if not lane.size:
            break
        base, at = lane * (size + 1), position[lane]
        end = np.minimum(at + WINDOW, size)
        used, word = np.zeros(lane.size, np.int64), np.zeros(lane.size, np.uint64)
        fits = np.ones(lane.size, np.bool_)
        for _ in range(_MOST_CODES):
            symbol = padded[base + at]
            run = np.minimum(runs[base + at], end - at)
            if long_run != short_run:
                too_long = (run < long_run) | (used + run_lengths[long_run] > WORD_BITS)
                run = np.where(too_long, np.minimum(run, short_run), run)
            code = np.where(run > 0, run_codes[run], codes[symbol])
            length = np.where(run > 0, run_lengths[run], lengths[symbol])
            fits &= (at < end) & (used + length <= WORD_BITS)
            if not fits.any():
                break
            word |= np.where(fits, code << used.astype(np.uint64), _NONE)
            used += np.where(fits, length, 0)
            at += np.where(fits, np.maximum(run, 1), 0)
        ends = (at == size) & (used + _END_LENGTH <= WORD_BITS)
        fill = ~ends & ((at < end) | (at == size))
        tail = np.where(ends, _END_BITS, np.where(fill, _ONES, _NONE))
        words[lane, number] = word | tail << used.astype(np.uint64)
        position[lane] = at
        counts[lane[ends]] = number + 1
    return words, counts


@lru_cache(maxsize=2)
def _decode_table(mode_name: str) -> tuple[Ints, Ints, Ints]:
    """For the next 12 bits: length of the code, repeats (0 is END), and the symbol."""
    mode = MODES[mode_name]
    table = np.zeros((3, 1 << MAX_CODE), np.int64)

    def enter(codeword: str, repeats: int, symbol: int) -> None:
        table[:, bits_of(codeword) :: 1 << len(codeword)] = [[len(codeword)], [repeats], [symbol]]

    for codeword, meaning in zip(CODEWORDS, mode.meanings, strict=True):
        enter(codeword, *(meaning or (_NOTHING, 0)))
    enter(END, 0, 0)
    for byte in range(256):
        enter(LITERAL + f"{byte:08b}", 1, _LITERALS + byte)
    return table[0], table[1], table[2]


@dataclass
class _Lanes:
    """Decoding state; `cause` is 0 as long as all is well."""

    out: Bytes
    position: Ints
    cause: Ints
    value: Ints
    running: Bools

    def fail(self, lanes: Ints | Bools, cause: Cause, value: Ints | Bytes | None = None) -> None:
        """Stop those of `lanes` that have not failed yet."""
        fresh = np.zeros(self.cause.size, np.bool_)
        fresh[lanes] = True
        fresh &= self.cause == 0
        self.cause[fresh] = cause
        self.value[fresh] = (self.position if value is None else value)[fresh]
        self.running &= self.cause == 0

    def failures(self, tiles: Ints) -> list[tuple[int, int, int, int]]:
        """The first failed lane as (tile, engine, cause, value), if there is one."""
        bad = np.flatnonzero(self.cause)[:1]
        return [
            (int(tiles[i // ENGINES]), int(i % ENGINES), int(self.cause[i]), int(self.value[i]))
            for i in bad
        ]


def _decode_lanes(engines: Bytes, stored: Ints, size: int, mode: Mode) -> _Lanes:
    """Decode (tiles, 4, bytes) of engine streams, of which `stored` bytes a tile count."""
    streams = engines.reshape(-1, engines.shape[2])
    zeros = np.zeros(streams.shape[0], np.int64)
    lanes = _Lanes(
        np.empty((zeros.size, size), np.uint8), zeros, zeros.copy(), zeros.copy(), zeros == 0
    )
    early = 0 if mode is not LOW else 2
    dictionary = np.concatenate([streams[:, 2 : 2 + early], streams[:, 6:HEADER]], axis=1)
    _check_headers(lanes, streams, dictionary, size, mode)
    lanes.out[:] = dictionary[:, :1]
    symbols = np.zeros((zeros.size, _LITERALS + 256), np.uint8)
    symbols[:, : dictionary.shape[1]] = dictionary
    symbols[:, _LITERALS:] = np.arange(256)
    words = np.ascontiguousarray(streams[:, HEADER:]).view("<u8").astype(np.uint64)
    counts = np.repeat((stored - HEADER) // 8, ENGINES)
    ended = zeros != 0
    for number in range(words.shape[1]):
        lanes.fail(lanes.running & ~ended & (counts == number), Cause.MISSING_END)
        lanes.fail(lanes.running & ended & (words[:, number] != 0), Cause.PADDING)
        lane = np.flatnonzero(lanes.running & ~ended)
        if lane.size:
            ended[lane] = _decode_word(lanes, lane, words[lane, number], symbols, size, mode)
    lanes.fail(lanes.running & ~ended, Cause.MISSING_END)
    odd, even = _checksums(lanes.out)
    wrong = (odd != streams[:, 4]) | (even != streams[:, 5])
    lanes.fail(wrong, Cause.CHECKSUM, odd.astype(np.int64) << 8 | even)
    return lanes


def _check_headers(lanes: _Lanes, streams: Bytes, dictionary: Bytes, size: int, mode: Mode) -> None:
    head = streams[:, :HEADER].astype(np.int64)
    known = np.isin(head[:, 0], [m.byte for m in MODES.values()])
    lanes.fail(~known, Cause.UNKNOWN_MODE, head[:, 0])
    lanes.fail(head[:, 0] != mode.byte, Cause.OTHER_MODE, head[:, 0])
    lanes.fail(head[:, 1] * 128 != size, Cause.WRONG_LENGTH, head[:, 1])
    if mode is not LOW:
        reserved = head[:, 2] << 8 | head[:, 3]
        lanes.fail(reserved != 0, Cause.RESERVED_HEADER, reserved)
    differs = dictionary != np.repeat(dictionary[::ENGINES], ENGINES, axis=0)
    lanes.fail(differs.any(axis=1), Cause.DICTIONARY_DIFFERS, differs.argmax(axis=1))


def _decode_word(
    lanes: _Lanes, lane: Ints, word: Words, symbols: Bytes, size: int, mode: Mode
) -> Bools:
    """Decode one word of every lane in `lane`; tell which of them met END."""
    lengths, repeats, meanings = _decode_table(mode.name)
    at = lanes.position[lane]
    window = at + WINDOW
    rest, left = word.copy(), np.full(lane.size, WORD_BITS)
    going, ended = np.ones(lane.size, np.bool_), np.zeros(lane.size, np.bool_)

    def fail(bad: Bools, cause: Cause) -> None:
        nonlocal going
        if bad.any():
            lanes.position[lane] = at
            lanes.fail(lane[bad], cause)
            going &= ~bad

    while True:
        full = going & (at == window) & (at < size)
        fail(full & (rest != 0), Cause.PADDING)
        filled = going & (left <= _LONGEST_FILL)
        filled &= rest == _ONES >> (WORD_BITS - left).astype(np.uint64)
        # END would have fitted: after the last byte only it may follow.
        fail(filled & (at == size) & (left >= _END_LENGTH), Cause.MISSING_END)
        going &= ~full & ~filled
        if not going.any():
            break
        entry = (rest & np.uint64((1 << MAX_CODE) - 1)).astype(np.int64)
        length, repeat = lengths[entry], repeats[entry]
        fail(going & (length > left), Cause.STRADDLE)
        fail(going & (repeat == _NOTHING), Cause.UNUSED_CODE)
        end = going & (repeat == 0)
        fail(end & (at < size), Cause.EARLY_END)
        rest >>= length.astype(np.uint64)
        fail(end & (rest != 0), Cause.PADDING)
        ended |= end & going
        going &= ~end
        fail(going & (repeat > size - at), Cause.PAST_LENGTH)
        fail(going & (repeat > window - at), Cause.PAST_WINDOW)
        # Runs are in place already: `out` starts out full of the first byte.
        single = np.flatnonzero(going & (repeat == 1))
        lanes.out[lane[single], at[single]] = symbols[lane[single], meanings[entry[single]]]
        at += np.where(going, repeat, 0)
        left -= np.where(going, length, 0)
    lanes.position[lane] = at
    return ended
