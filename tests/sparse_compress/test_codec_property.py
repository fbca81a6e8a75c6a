"""Both backends against a plain encoder that follows the document line by line."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_compress import codec
from sparse_compress.codec import CodecError

NATIVE_NOTE = codec.backend_note()
NATIVE = pytest.mark.skipif(NATIVE_NOTE is not None, reason=str(NATIVE_NOTE))
BACKENDS = [pytest.param("native", marks=NATIVE), "reference"]
SIZES = {"low": 36, "high": 34}

# ------------------------------------------------------------------ the plain encoder


def code_table(mode, d):
    """Byte string -> code, for every byte string that has a code of its own."""
    three = {"low": [[d[0]], [d[0]] * 2, *([v] for v in d[1:4])]}
    three["high"] = [*([d[0]] * n for n in (1, 2, 3, 4)), [d[1]]]
    longer = {"low": [[v] for v in d[4:]], "high": [[d[0]] * 9, *([v] for v in d[2:])]}
    codes = {bytes([v]): "1111" + f"{v:08b}" for v in range(256)}
    for number, what in enumerate(three[mode]):
        codes[bytes(what)] = f"{number:03b}"
    for number, what in enumerate(longer[mode]):
        if number < 18:
            codes[bytes(what)] = f"{0b101000 + number:06b}"
        else:
            codes[bytes(what)] = f"{0b111010000 + number - 18:09b}"
    return codes


def next_code(raw, at, end, room, codes):
    """The longest run that has a code and fits, else the byte alone; None if nothing fits."""
    for count in (9, 4, 3, 2, 1):
        code = codes.get(raw[at : at + count]) if at + count <= end else None
        if code is not None and len(code) <= room:
            return code, count
    return None


def plain_engine(raw, mode, d, codes):
    odd = even = 0
    for position, byte in enumerate(raw):
        odd, even = (odd ^ byte, even) if position % 2 else (odd, even ^ byte)
    early, late = (d[:2], d[2:]) if mode == "low" else ([0, 0], d)
    first = 0xA8 if mode == "low" else 0x88
    stream = bytes([first, len(raw) // 128, *early, odd, even, *late])
    at, ended = 0, False
    while not ended:
        if len(stream) >= len(raw):
            return None
        end, word, stuck = min(at + 64, len(raw)), "", False
        while at < end and not stuck:
            found = next_code(raw, at, end, 64 - len(word), codes)
            stuck = found is None
            if found:
                word, at = word + found[0], at + found[1]
        if at == len(raw) and len(word) + 9 <= 64:
            word, ended = word + "111011111", True
        fill = "0" if ended or (at == end and at < len(raw)) else "1"
        stream += int(word.ljust(64, fill)[::-1], 2).to_bytes(8, "little")
    return stream


def plain_encode(stream, sizes, mode, init_offset, d):
    codes = code_table(mode, d)
    weight, index, start = b"", b"", 0
    for size in sizes:
        tile = bytes(stream[start : start + size])
        start += size
        chunks = [tile[i : i + 64] for i in range(0, size, 64)]
        raws = [b"".join(chunks[e::4]) for e in range(4)]
        engines = [plain_engine(raw, mode, d, codes) for raw in raws]
        coded = None not in engines
        if not coded:
            engines = raws
        blocks = max(-(-len(engine) // 32) for engine in engines)
        engines = [engine.ljust(32 * blocks, b"\0") for engine in engines]
        offset = -(-(len(weight) + init_offset) // 128)
        index += (blocks | coded << 15).to_bytes(4, "little") + offset.to_bytes(4, "little")
        weight += b"".join(e[32 * b : 32 * b + 32] for b in range(blocks) for e in engines)
    return weight, index


# --------------------------------------------------------------------------- strategies


@st.composite
def cases(draw):
    """Tiles of runs and noise over a few bytes, with any dictionary."""
    mode = draw(st.sampled_from(["low", "high"]))
    sizes = draw(st.lists(st.integers(1, 4).map(lambda n: 512 * n), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    few = rng.permutation(256)[: draw(st.sampled_from([1, 2, 5, 36, 60, 256]))]
    frequent = draw(st.sampled_from([0, 0.2, 0.5, 0.8, 0.97]))
    longest = draw(st.sampled_from([1, 2, 3, 9, 20, 100]))
    total = sum(sizes)
    bytes_ = np.where(rng.random(total) < frequent, few[0], rng.choice(few, total))
    stream = np.repeat(bytes_, rng.integers(1, longest + 1, total))[:total].astype(np.uint8)
    size = SIZES[mode]
    dictionary = draw(st.sampled_from([None, rng.permutation(256)[:size], few[:size]]))
    if dictionary is not None and dictionary.size < size:
        rest = np.setdiff1d(np.arange(256), dictionary)
        dictionary = np.append(dictionary, rest[: size - dictionary.size])
    return stream, sizes, mode, draw(st.integers(0, 1 << 20)), dictionary


def by_rank(stream, mode):
    values, counts = np.unique(stream, return_counts=True)
    count_of = dict(zip(values.tolist(), counts.tolist(), strict=True))
    return sorted(range(256), key=lambda v: (-count_of.get(v, 0), v))[: SIZES[mode]]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_like_the_plain_encoder_and_back(backend, case):
    stream, sizes, mode, init_offset, dictionary = case
    weight, index = codec.encode_tiles(
        stream,
        sizes,
        mode,
        dictionary=dictionary,
        init_offset=init_offset,
        backend=backend,
        threads=2,
    )
    d = by_rank(stream, mode) if dictionary is None else [int(v) for v in dictionary]
    expected_weight, expected_index = plain_encode(stream, sizes, mode, init_offset, d)
    assert weight.tobytes() == expected_weight
    assert index.tobytes() == expected_index
    back = codec.decode_tiles(
        weight, index, sizes, mode=mode, init_offset=init_offset, backend=backend, threads=2
    )
    assert np.array_equal(back, stream)


def outcome(backend, weight, index, sizes, mode, init_offset):
    try:
        options = {"mode": mode, "init_offset": init_offset, "backend": backend}
        return codec.decode_tiles(weight, index, sizes, **options).tobytes()
    except CodecError as error:
        return str(error)


def flip_bytes(rng, target):
    for position in rng.integers(0, target.size, rng.integers(1, 4)):
        target[position] ^= np.int8(rng.integers(1, 128))


def replace_words(rng, weight, index):
    """Random words in the first tile; the headers, 40 bytes of each engine, stay good."""
    blocks = weight[: (index.view("<u4")[0] & 0x1FF) * 128].reshape(-1, 4, 32)
    engine = rng.integers(0, 4)
    words = blocks[2:, engine]
    words[:] = rng.integers(-128, 128, words.shape) & rng.choice([0x49, 0x33, -1])
    blocks[1, engine, 8:] = rng.integers(-128, 128, 24)


@settings(max_examples=200, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**32), part=st.sampled_from(["weight", "index", "words"]))
def test_corrupted_input_never_crashes(case, seed, part):
    stream, sizes, mode, init_offset, dictionary = case
    rng = np.random.default_rng(seed)
    weight, index = codec.encode_tiles(
        stream, sizes, mode, dictionary=dictionary, init_offset=init_offset, backend="reference"
    )
    if part == "words":
        replace_words(rng, weight, index)
    else:
        flip_bytes(rng, index if part == "index" else weight)
    backends = ["reference"] if NATIVE_NOTE else ["reference", "native"]
    results = {outcome(backend, weight, index, sizes, mode, init_offset) for backend in backends}
    assert len(results) == 1


def coded_tile(seed):
    rng = np.random.default_rng(seed)
    stream = np.clip(rng.normal(0, 8, 4096).round(), -128, 127).astype(np.int8).view(np.uint8)
    stream[rng.random(4096) < 0.5] = 0
    return stream, *codec.encode_tiles(stream, [4096], ("low", "high")[seed % 2])


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_of_a_coded_tile_are_detected(seed):
    """Not a law: a flip that moves codes can escape the XOR by chance, about once in 2**16."""
    _, weight, index = coded_tile(seed)
    rng = np.random.default_rng(seed)
    for position in rng.integers(0, 8 * weight.size, 100):
        flipped = weight.copy()
        flipped.view(np.uint8)[position // 8] ^= 1 << position % 8
        with pytest.raises(CodecError, match="tile 0, engine"):
            codec.decode_tiles(flipped, index, [4096], mode=("low", "high")[seed % 2])


def long_tiles(seed):
    """Tiles that go far with several codes at once; an engine that ends long before the others."""
    rng = np.random.default_rng(seed)
    stream = np.clip(rng.normal(0, 12, 5 * 16384).round(), -128, 127).astype(np.int8)
    stream[rng.random(stream.size) < rng.choice([0, 0.5, 0.7, 0.97])] = 0
    stream.reshape(-1, 4, 64)[256:512, 2] = 0
    stream = stream.view(np.uint8)
    # 255 is a literal, of the same bits as what fills a word.
    stream[stream == 255] = 1
    stream[rng.integers(0, stream.size, 40)] = 255
    return stream, [16384, 16384, 16384, 8192, 8192, 8192 + 512, 8192 - 512]


@NATIVE
@pytest.mark.parametrize("mode", ["low", "high"])
@pytest.mark.parametrize("seed", range(3))
def test_long_tiles_like_the_reference(mode, seed):
    stream, sizes = long_tiles(seed)
    weight, index = codec.encode_tiles(stream, sizes, mode, backend="reference")
    for threads in (1, 3):
        native = codec.encode_tiles(stream, sizes, mode, backend="native", threads=threads)
        assert np.array_equal(native[0], weight)
        assert np.array_equal(native[1], index)
    back = codec.decode_tiles(weight, index, sizes, mode=mode, backend="native")
    assert np.array_equal(back, stream)
    words = weight.view("<u8")
    for position in np.random.default_rng(seed).integers(0, words.size, 3):
        broken = words.copy()
        broken[position] ^= np.uint64(1) << np.uint64(position % 64)
        found = {
            outcome(backend, broken.view(np.int8), index, sizes, mode, 0)
            for backend in ("native", "reference")
        }
        assert len(found) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_exchanged_bytes_escape_the_checksum(backend):
    """What the XOR cannot see: two codes of one length exchanged, two positions apart."""
    stream = np.tile(np.array([1, 1, 1, 2, 2, 3, 4, 0], np.uint8), 64)
    weight, index = codec.encode_tiles(stream, [512], backend=backend)
    first_word = weight.view(np.uint8)[4 * 32 + 8 : 4 * 32 + 16].view("<u8")
    # d0 = 1, d1 = 2, then 0, 3, 4 by value: 001 000 010 010 100 101000 011.
    bits = f"{int(first_word[0]):064b}"[::-1]
    assert bits.startswith("001000010010100101000011")
    # Raw bytes 3 and 5 are 2 and 3: both 3 bits, both at odd positions.
    changed = bits[:6] + bits[12:15] + bits[9:12] + bits[6:9] + bits[15:]
    first_word[0] = int(changed[::-1], 2)
    decoded = codec.decode_tiles(weight, index, [512], backend=backend)
    assert decoded[:8].tolist() == [1, 1, 1, 3, 2, 2, 4, 0]
    assert np.array_equal(decoded[8:], stream[8:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tiles(backend):
    weight, index = codec.encode_tiles(np.zeros(0, np.uint8), [], backend=backend)
    assert weight.size == index.size == 0
    assert codec.decode_tiles(weight, index, [], backend=backend).size == 0
