"""int4 layouts: golden bytes, every byte, loops, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ms_quant.errors import MsQuantError
from ms_quant.numerics import pack

PAIRS = {
    "along_out": (pack.pack_along_out, pack.unpack_along_out),
    "words": (pack.pack_words, pack.unpack_words),
}
CODES = np.array([[1, -1, -8, 7], [2, 3, -2, 0]], np.int8)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        # 2 << 4 | 1, 3 << 4 | 15, 14 << 4 | 8, 0 << 4 | 7: the odd row is high
        ("along_out", [[0x21, 0x3F, 0xE8, 0x07]]),
    ],
)
def test_golden_bytes(layout, expected):
    packed = PAIRS[layout][0](CODES, "w")
    assert packed.dtype == np.int8
    assert packed.flags.c_contiguous
    assert packed.view(np.uint8).tolist() == expected


def test_golden_word():
    """Nibbles are q + 8, the first input lowest: -8 is 0, 7 is 15, 0 is 8."""
    codes = np.array([[-8, 7, 0, 1, -1, -7, 6, 7]], np.int8)
    packed = pack.pack_words(codes, "w")
    assert packed.dtype == np.int32
    assert packed.view(np.uint32).tolist() == [[0xFE1798F0]]
    assert packed.tobytes() == bytes([0xF0, 0x98, 0x17, 0xFE])  # little-endian in the file


def test_golden_word_of_int8():
    """Bytes are q + 128, the first input lowest."""
    packed = pack.pack_words(np.array([[-128, 127, 0, -1]], np.int8), "w", 8)
    assert packed.dtype == np.int32 and packed.tobytes() == bytes([0x00, 0xFF, 0x80, 0x7F])
    assert pack.unpack_words(packed, "w", 8).tolist() == [[-128, 127, 0, -1]]
    with pytest.raises(MsQuantError, match=r"in = 6 .* a multiple of 4 to pack int8"):
        pack.pack_words(np.zeros((1, 6), np.int8), "w", 8)


@pytest.mark.parametrize("layout", ["along_out"])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_every_byte_round_trips(layout, dtype):
    packing, unpacking = PAIRS[layout]
    packed = np.arange(256).astype(np.uint8).view(dtype).reshape(16, 16)
    codes = unpacking(packed, "w")
    assert codes.dtype == np.int8
    assert (codes.min(), codes.max()) == (-8, 7)
    np.testing.assert_array_equal(packing(codes, "w").view(dtype), packed)


@settings(max_examples=50, deadline=None)
@given(
    words=hnp.arrays(np.int32, st.tuples(st.integers(0, 3), st.integers(0, 3))),
    bits=st.sampled_from([4, 8]),
)
def test_every_word_round_trips(words, bits):
    codes = pack.unpack_words(words, "w", bits)
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(pack.pack_words(codes, "w", bits), words)


@pytest.mark.parametrize("layout", PAIRS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_every_code_round_trips(layout, data):
    packing, unpacking = PAIRS[layout]
    rows, columns = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 3)))
    shape = (rows, 8 * columns) if layout == "words" else (2 * rows, columns)
    codes = data.draw(hnp.arrays(np.int8, shape, elements=st.integers(-8, 7)))
    packed = packing(codes, "w")
    assert packed.nbytes * 2 == codes.nbytes
    np.testing.assert_array_equal(unpacking(packed, "w"), codes)
    strided = np.asfortranarray(np.repeat(codes, 2, axis=1))[:, ::2]
    np.testing.assert_array_equal(packing(strided, "w"), packed)


def test_loops():
    codes = np.random.default_rng(0).integers(-8, 8, (6, 16)).astype(np.int8)
    q = codes.tolist()
    along_out = pack.pack_along_out(codes, "w")
    words = pack.pack_words(codes, "w").view(np.uint32)
    for n in range(6):
        for j in range(2):
            assert words[n, j] == sum((q[n][8 * j + i] + 8) << (4 * i) for i in range(8))
    for i in range(3):
        for k in range(16):
            byte = (q[2 * i + 1][k] & 15) << 4 | (q[2 * i][k] & 15)
            assert along_out.view(np.uint8)[i, k] == byte


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        ("along_out", (3, 2), r"layer\.weight: out = 3 .* a multiple of 2"),
        ("along_out", (1, 2), "out = 1 .* a multiple of 2"),
        ("words", (2, 12), "in = 12 .* a multiple of 8"),
    ],
)
def test_refuses_odd_sizes(layout, shape, message):
    with pytest.raises(MsQuantError, match=message):
        PAIRS[layout][0](np.zeros(shape, np.int8), "layer.weight")


@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("value", [-9, 8, 127, -128])
def test_refuses_codes_beyond_four_bits(layout, value):
    codes = np.zeros((2, 8), np.int8)
    codes[1, 5] = value
    with pytest.raises(MsQuantError, match=rf"w: codes .*{value}.*, expected -8\.\.7"):
        PAIRS[layout][0](codes, "w")


@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("shape", [(), (8,), (2, 2, 8)])
def test_refuses_shapes(layout, which, shape):
    array = np.zeros(shape, np.int32 if layout == "words" and which else np.int8)
    with pytest.raises(MsQuantError, match=r"w: int.* expected two axes"):
        PAIRS[layout][which](array, "w")


@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint32, bool])
def test_refuses_types(layout, which, dtype):
    with pytest.raises(MsQuantError, match="expected two axes of"):
        PAIRS[layout][which](np.zeros((2, 8), dtype), "w")
