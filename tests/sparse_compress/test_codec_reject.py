"""One test for every cause that makes the decoder refuse, the same for both backends."""

import numpy as np
import pytest

from sparse_compress import codec
from sparse_compress.codec import CodecError
from sparse_compress.codec.format import END, HIGH, LOW

NATIVE = pytest.mark.skipif(codec.backend_note() is not None, reason=str(codec.backend_note()))
BACKENDS = [pytest.param("native", marks=NATIVE), "reference"]

TWO = "001"
"""Two zeros, in both modes."""
FULL = TWO * 21 + "1"
GOOD = (FULL, FULL, FULL, TWO + END)
"""128 zeros in low mode: 3 x 42 + 2."""
NINES = "101000" * 7
"""63 zeros in high mode."""
GOOD_HIGH = (NINES + "000", NINES + "000" + END)


def engine(words, mode=LOW, **bytes_at):
    """One engine of a tile of 512 zeros: header, words as bits in stream order, padding.

    High mode takes 2 blocks (3 words) of 32 bytes, low mode 3 blocks (7 words).
    """
    head = np.zeros(40, np.uint8)
    head[:2] = mode.byte, 1
    head[6:] = np.arange(34) + mode.dictionary_size - 34
    head[3] = 1 if mode is LOW else 0
    for name, value in bytes_at.items():
        head[int(name.removeprefix("b"))] = value
    body = b"".join(int(word.ljust(64, "0")[::-1], 2).to_bytes(8, "little") for word in words)
    return np.frombuffer((head.tobytes() + body).ljust(96 if mode is LOW else 64, b"\0"), np.uint8)


def tile(*engines):
    return np.stack(engines).reshape(4, -1, 32).swapaxes(0, 1).reshape(-1).view(np.int8)


def record(length, offset=0, coded=1, flags=0, reserved=0):
    first = length | flags << 9 | coded << 15 | reserved << 16
    return np.array([first, offset], "<u4").view(np.int8)


def decode(words, backend, mode=LOW, **changes):
    """Decode two good tiles and one (number 2) whose engine 1 is another."""
    good = engine(GOOD if mode is LOW else GOOD_HIGH, mode)
    bad = engine(words, mode, **changes)
    weight = np.concatenate([tile(*[good] * 4)] * 2 + [tile(good, bad, good, good)])
    blocks = good.size // 32
    index = np.concatenate([record(blocks, blocks * i) for i in range(3)])
    return codec.decode_tiles(weight, index, [512] * 3, mode=mode.name, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("mode", "words"), [(LOW, GOOD), (HIGH, GOOD_HIGH)])
def test_the_good_tile_decodes(mode, words, backend):
    assert not decode(words, backend, mode).any()


HEADERS = {
    "unknown mode byte 0x12": (LOW, {"b0": 0x12}),
    "mode byte 0x88 belongs to the other mode": (LOW, {"b0": 0x88}),
    "mode byte 0xa8 belongs to the other mode": (HIGH, {"b0": 0xA8}),
    "gives L = 2 x 128 bytes": (LOW, {"b1": 2}),
    "gives L = 0 x 128 bytes": (LOW, {"b1": 0}),
    "bytes 2 and 3 of a high header are 0x0700": (HIGH, {"b2": 7}),
    "differs from engine 0's at entry 35": (LOW, {"b39": 99}),
    "checksum mismatch: the decoded bytes give 0x0000": (LOW, {"b4": 1}),
    "decoded bytes give 0x0000": (HIGH, {"b5": 128}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("message", HEADERS)
def test_header(message, backend):
    mode, changes = HEADERS[message]
    with pytest.raises(CodecError, match=f"^tile 2, engine 1: .*{message}"):
        decode(GOOD if mode is LOW else GOOD_HIGH, backend, mode, **changes)


ODD = "010" * 11 + "000" * 10 + "1"
"""43 zeros in high mode, without room for END."""
TEN_LEFT = "011" * 15 + "001" + "000" * 2
"""64 zeros in high mode that leave 10 bits, just enough for END."""
WORDS = {
    "3-bit code in the last bit": (LOW, [TWO * 21 + "0"], "straddles two words after 42"),
    "6-bit code in 4 bits": (LOW, [TWO * 20 + "1010"], "straddles two words after 40"),
    "12-bit code in 10 bits": (LOW, [TWO * 18 + "1111111110"], "straddles two words after 36"),
    "unused code": (LOW, [TWO + "111011110"], "unused code 111011110 appears after 2"),
    "one byte too many": (LOW, [*GOOD[:3], TWO + "000" + END], "past L after 128"),
    "run over the end": (LOW, [*GOOD[:3], "000" + TWO + END], "past L after 127"),
    "run over the window": (HIGH, [NINES + TWO], "64-byte window of its word after 63"),
    "END at once": (LOW, [END], "END comes before L, after 0"),
    "END one byte early": (LOW, [*GOOD[:3], "000" + END], "END comes before L, after 127"),
    "fill where END fits": (HIGH, [GOOD_HIGH[0], TEN_LEFT + "1" * 10, END], "missing after 128"),
    "no word for END": (HIGH, [ODD, ODD, FULL], "END is missing after 128"),
    "no words for the rest": (HIGH, [FULL] * 3, "END is missing after 126"),
    "bits after END": (LOW, [*GOOD[:3], TWO + END + "01"], "non-zero padding after 128"),
    "words after END": (LOW, [*GOOD, "0" * 63 + "1"], "non-zero padding after 128"),
    "bits after the window": (HIGH, [NINES + "0001"], "non-zero padding after 64"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WORDS)
def test_words(name, backend):
    mode, words, message = WORDS[name]
    with pytest.raises(CodecError, match=f"^tile 2, engine 1: .*{message}"):
        decode(words, backend, mode)


TILE = tile(*[engine(GOOD)] * 4)
INDEXES = {
    "has 8 bytes; expected 8 for each of 2 tiles": [record(3)],
    "tile 1: the index record sets a reserved bit": [record(3), record(3, 3, reserved=1)],
    "tile 0: the index record sets a flag": [record(3, flags=1), record(3, 3)],
    "tile 1: stored raw in 384 bytes; expected the 512": [record(3), record(3, 3, coded=0)],
    "tile 1: coded in 640 bytes, more than the 512": [record(3), record(5, 3)],
    "tile 0: coded in 128 bytes; a tile of this size takes at least 256": [record(1), record(3, 1)],
    "tile 0: coded in 0 bytes": [record(0), record(3)],
    "tile 1: .*byte 768, outside the weight of 768": [record(3), record(3, 6)],
    "tile 1: .*byte 549755813760, outside": [record(3), record(3, 2**32 - 1)],
    "the weight is truncated: the tile ends at byte 896 of 768": [record(3), record(4, 3)],
    "tile 1: .*byte 256, but .* end at 384: they overlap": [record(3), record(3, 2)],
    "tile 1: .*byte 384, but .* end at 256: there is a gap": [record(2), record(3, 3)],
    "tile 0: .*byte 384, but .* end at 0: there is a gap": [record(3, 3), record(3)],
    "128 trailing bytes of the weight belong to no tile": [record(3), record(2, 3)],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("message", INDEXES)
def test_index(message, backend):
    weight, index = np.concatenate([TILE, TILE]), np.concatenate(INDEXES[message])
    with pytest.raises(CodecError, match=message):
        codec.decode_tiles(weight, index, [512, 512], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_index_of_another_init_offset(backend):
    index = record(3, 7)
    assert not codec.decode_tiles(TILE, index, [512], init_offset=7 * 128, backend=backend).any()
    with pytest.raises(CodecError, match="byte 896, outside the weight"):
        codec.decode_tiles(TILE, index, [512], backend=backend)
    with pytest.raises(CodecError, match="byte -128, outside the weight"):
        codec.decode_tiles(TILE, index, [512], init_offset=8 * 128, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_bad_tile_and_engine_are_named(backend):
    good, bad, worse = engine(GOOD), engine([END]), engine(GOOD, b0=1)
    weight = np.concatenate([tile(good, good, bad, worse), tile(worse, good, good, good)])
    index = np.concatenate([record(3), record(3, 3)])
    for threads in (1, 2):
        with pytest.raises(CodecError, match=r"^tile 0, engine 2: END comes before L"):
            codec.decode_tiles(weight, index, [512, 512], backend=backend, threads=threads)


ZEROS = np.zeros(512, np.uint8)
ARGUMENTS = {
    "mode is 'middle'": lambda: codec.encode_tiles(ZEROS, [512], "middle"),
    "backend is 'gpu'": lambda: codec.encode_tiles(ZEROS, [512], backend="gpu"),
    "tile 1: 513 raw bytes": lambda: codec.encode_tiles(ZEROS, [512, 513]),
    "tile 0: 33280 raw bytes; expected a multiple of 512 up to 32768": lambda: codec.decode_tiles(
        TILE, record(3), [33280]
    ),
    "tile 0: 0 raw bytes": lambda: codec.decode_tiles(TILE, record(3), [0]),
    "tile 0: -512 raw bytes": lambda: codec.decode_tiles(TILE, record(3), [-512]),
    "tile sizes are float64": lambda: codec.decode_tiles(
        TILE,
        record(3),
        [512.0],  # type: ignore[list-item]
    ),
    "the data has 512 bytes; its tiles add up to 1024": lambda: codec.encode_tiles(ZEROS, [1024]),
    "the data is float32 of shape": lambda: codec.encode_tiles(ZEROS.astype(np.float32), [512]),
    "the weight is int8 of shape": lambda: codec.decode_tiles(
        TILE.reshape(2, -1), record(3), [512]
    ),
    "low mode needs 36 integers": lambda: codec.encode_tiles(ZEROS, [512], dictionary=range(34)),
    "distinct byte values": lambda: codec.encode_tiles(ZEROS, [512], dictionary=[0] * 36),
    "in 0..255": lambda: codec.encode_tiles(ZEROS, [512], dictionary=range(250, 286)),
    "init_offset is -1": lambda: codec.encode_tiles(ZEROS, [512], init_offset=-1),
    "record holds 32 bits": lambda: codec.encode_tiles(
        np.zeros(1024, np.uint8), [512, 512], init_offset=2**39 - 128
    ),
    "a .2147483648, 4096. weight takes": lambda: codec.decompress_matrix(
        TILE, record(3), codec.matrix_info(2**31, 4096)
    ),
}


@pytest.mark.parametrize("message", ARGUMENTS)
def test_arguments(message):
    with pytest.raises(CodecError, match=message):
        ARGUMENTS[message]()
