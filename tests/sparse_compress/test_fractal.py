import re

import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from sparse_compress import codec
from sparse_compress.codec import fractal

NATIVE = pytest.mark.skipif(codec.backend_note() is not None, reason=str(codec.backend_note()))


def place(n, k, row, column):
    """Where one element goes, from the document's words: (tile, position in the tile)."""
    n1, k1 = -(-n // 16), -(-k // 32)
    tiles_across = -(-k1 // 8)
    n_tile, k_tile = row // 128, column // 256
    wide = 8 if n >= 128 else n1
    n_fractal = row // 16 % 8
    last = n_tile == -(-n1 // 8) - 1
    if n >= 128 and last and n1 % 8:
        n_fractal += 8 - n1 % 8
    k_fractal = column // 32 % 8
    inside = ((k_fractal * wide + n_fractal) * 16 + row % 16) * 32 + column % 32
    return n_tile * tiles_across + k_tile, inside


@pytest.mark.parametrize(
    ("n", "k"), [(128, 320), (1, 1), (48, 256), (127, 33), (192, 300), (257, 64), (250, 600)]
)
def test_every_element_is_where_the_document_puts_it(n, k):
    rng = np.random.default_rng(n * k)
    weight = rng.integers(-128, 128, (n, k), dtype=np.int8)
    stream, sizes = fractal.to_fractal(weight)
    starts = np.cumsum(sizes) - sizes
    expected = np.zeros(stream.size, np.uint8)
    for row in range(n):
        for column in range(k):
            tile, inside = place(n, k, row, column)
            expected[starts[tile] + inside] = weight[row, column]
    assert np.array_equal(stream, expected)
    assert np.array_equal(fractal.from_fractal(stream, n, k), weight)
    assert sizes.size == fractal.tile_count(n, k)


@pytest.mark.parametrize(
    ("n", "k", "sizes"),
    [
        (128, 320, [32768, 8192]),
        (256, 512, [32768] * 4),
        (192, 288, [32768, 4096, 32768, 4096]),  # the last n-tile is as wide as the others
        (16, 32, [512]),
        (48, 250, [8 * 3 * 512]),
    ],
)
def test_tile_sizes(n, k, sizes):
    assert fractal.tile_sizes(n, k).tolist() == sizes


def test_last_rows_come_last_in_their_tile():
    weight = np.zeros((192, 256), np.int8)
    weight[128:] = 1
    stream, _ = fractal.to_fractal(weight)
    assert stream.reshape(2, 8, 8, 512)[1].any(axis=2).tolist() == [[False] * 4 + [True] * 4] * 8


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.zeros((64, 257), np.int8), r"\(64, 257\); fewer than 128 rows need k <= 256"),
        (np.zeros((0, 32), np.int8), "at least one row"),
        (np.zeros((16, 32), np.uint8), "uint8 of shape"),
        (np.zeros(32, np.int8), "expected an int8 matrix"),
    ],
)
def test_refused_weights(weight, message):
    with pytest.raises(MsQuantError, match=message):
        fractal.to_fractal(weight)


def test_refused_stream():
    with pytest.raises(MsQuantError, match="takes 512 bytes"):
        fractal.from_fractal(np.zeros(1024, np.uint8), 16, 32)


@pytest.mark.parametrize(
    ("n", "k", "reason"),
    [
        (128, 320, None),
        (4096, 11008, None),
        (192, 320, None),
        (128, 256, "k = 256 .* more than 256"),
        (128, 330, "k = 330 .* multiple of 64"),
        (64, 320, "n = 64 .* at least 128"),
        (160, 320, "n = 160 .* multiple of 64"),
    ],
)
def test_unsupported_reason(n, k, reason):
    found = fractal.unsupported_reason(n, k)
    assert found is None if reason is None else re.search(reason, str(found))


@pytest.mark.parametrize("backend", [pytest.param("native", marks=NATIVE), "reference"])
@pytest.mark.parametrize("shape", [(128, 320), (192, 320), (40, 100), (300, 70)])
@pytest.mark.parametrize("mode", ["low", "high"])
def test_matrix_roundtrip(shape, mode, backend):
    rng = np.random.default_rng(3)
    weight = np.clip(rng.normal(0, 9, shape).round(), -128, 127).astype(np.int8)
    weight[rng.random(shape) < 0.6] = 0
    packed = codec.compress_matrix(weight, mode, backend=backend)
    assert packed.info.tolist() == [8, 8, *shape[::-1], 1]
    assert packed.info.dtype == np.int64
    assert np.array_equal(codec.decompress_matrix(*packed, mode, backend=backend), weight)


def test_a_weight_that_grows_is_refused():
    weight = np.random.default_rng(0).integers(-128, 128, (192, 512), dtype=np.int8)
    with pytest.raises(MsQuantError, match="at most 98304: leave it uncompressed"):
        codec.compress_matrix(weight)
