"""The functions that programs call: whole matrices, streams given as any bytes, exact sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_compress
from ms_quant.errors import MsQuantError
from sparse_compress import codec
from sparse_compress.codec import CodecError, fractal


def gaussian(shape, zeros=0.5, sigma=9, seed=0):
    rng = np.random.default_rng(seed)
    weight = np.clip(rng.normal(0, sigma, shape).round(), -128, 127).astype(np.int8)
    weight[rng.random(shape) < zeros] = 0
    return weight


def test_public_names():
    for name in {*sparse_compress.__all__} - {"compress_checkpoint"}:
        assert getattr(sparse_compress, name) is getattr(codec, name)
    assert sparse_compress.compress_checkpoint.__name__ == "compress_checkpoint"
    with pytest.raises(AttributeError, match="no attribute 'compression'"):
        _ = sparse_compress.compression


@pytest.mark.parametrize("mode", ["low", "high"])
def test_a_matrix_and_its_info(mode):
    weight = gaussian((256, 320))
    packed = sparse_compress.compress_matrix(weight, mode)
    assert (packed.weight.dtype, packed.index.dtype) == (np.int8, np.int8)
    assert (packed.info.dtype, packed.info.tolist()) == (np.int64, [8, 8, 320, 256, 1])
    assert np.array_equal(sparse_compress.decompress_matrix(*packed), weight)
    as_bytes = packed.weight.tobytes(), packed.index.tobytes(), packed.info.tolist()
    assert np.array_equal(sparse_compress.decompress_matrix(*as_bytes, mode), weight)


def test_the_mode_asked_for_is_insisted_on():
    packed = sparse_compress.compress_matrix(gaussian((128, 256)), "high")
    with pytest.raises(CodecError, match="tile 0, engine 0: mode byte 0x88 belongs to the other"):
        sparse_compress.decompress_matrix(*packed, "low")


INFOS = {
    "is int64 of shape .4,.; expected 5 integers": [8, 8, 320, 128],
    "is float64 of shape .5,.; expected 5 integers": [8.0, 8, 320, 128, 1],
    r"is .4, 8, 320, 128, 1.; expected .8, 8, k, n, 1.": [4, 8, 320, 128, 1],
    "is .8, 8, 320, 128, 0.; expected": [8, 8, 320, 128, 0],
    "the index has 16 bytes; a .256, 320. weight takes 32": [8, 8, 320, 256, 1],
    r"the weight is .-128, 320.; expected at least one row": [8, 8, 320, -128, 1],
    "the weight is .320, 0.; expected at least one row": [8, 8, 0, 320, 1],
}


@pytest.mark.parametrize("message", INFOS)
def test_wrong_info(message):
    weight, index, _ = sparse_compress.compress_matrix(gaussian((128, 320)))
    with pytest.raises(MsQuantError, match=message):
        sparse_compress.decompress_matrix(weight, index, INFOS[message])


def test_tiles_that_do_not_fit_the_shape_of_the_info():
    weight, index, _ = sparse_compress.compress_matrix(gaussian((128, 320)))
    with pytest.raises(CodecError, match="tile 1"):
        sparse_compress.decompress_matrix(weight, index, codec.matrix_info(128, 352))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, np.frombuffer])
def test_any_bytes(kind):
    raw = gaussian(2048).tobytes()
    given_bytes = kind(raw) if kind is not np.frombuffer else np.frombuffer(raw, np.int8)
    weight, index = codec.encode_tiles(given_bytes, 1024)
    assert (weight.dtype, index.dtype, weight.ndim) == (np.int8, np.int8, 1)
    back = codec.decode_tiles(weight.tobytes(), memoryview(index), 1024)
    assert (back.dtype, back.tobytes()) == (np.uint8, raw)


def test_bytes_that_are_none_or_apart():
    weight, index = codec.encode_tiles(b"", 512)
    assert weight.size == index.size == codec.decode_tiles(b"", b"", 512).size == 0
    raw = gaussian(2048)
    apart, _ = codec.encode_tiles(memoryview(raw)[::2], 512)
    assert apart.tobytes() == codec.encode_tiles(raw[::2], 512)[0].tobytes()


@settings(max_examples=40, deadline=None)
@given(
    total=st.integers(0, 12).map(lambda n: 512 * n),
    tile=st.integers(1, 5).map(lambda n: 512 * n),
    mode=st.sampled_from(["low", "high"]),
    sigma=st.sampled_from([1, 9, 80]),
    init_offset=st.integers(0, 1000),
)
def test_one_number_is_a_list_of_it_and_the_rest(total, tile, mode, sigma, init_offset):
    raw = gaussian(total, sigma=sigma, zeros=0.2)
    sizes = [tile] * (total // tile) + [total % tile] * (total % tile > 0)
    weight, index = codec.encode_tiles(raw, tile, mode, init_offset=init_offset)
    listed, listed_index = codec.encode_tiles(raw, sizes, mode, init_offset=init_offset)
    assert (weight.tobytes(), index.tobytes()) == (listed.tobytes(), listed_index.tobytes())
    for form in (tile, sizes):
        back = codec.decode_tiles(weight, index, form, init_offset=init_offset)
        assert back.tobytes() == raw.tobytes()


BAD_TILES = {
    "tile 0: 500 raw bytes; expected a multiple of 512": (slice(None), slice(None), 500),
    "tile 0: 65536 raw bytes": (slice(None), slice(None), 65536),
    "the index has 15 bytes": (slice(None), slice(15), 1024),
    "tile 1: the weight is truncated": (slice(-128), slice(None), 1024),
    "outside the weight of 0 bytes": (slice(0), slice(None), 1024),
    "trailing bytes of the weight": (slice(None), slice(8), 1024),
}


@pytest.mark.parametrize("message", BAD_TILES)
def test_bad_tiles_of_one_size(message):
    of_weight, of_index, tile = BAD_TILES[message]
    weight, index = codec.encode_tiles(gaussian(1536), 1024)
    with pytest.raises(CodecError, match=message):
        codec.decode_tiles(weight[of_weight], index[of_index], tile)


def test_the_last_tile_may_not_lie_about_its_size():
    """L of the last header is believed before anything is checked: 0 and too much are caught."""
    weight, index = codec.encode_tiles(gaussian(1536), 1024)
    last = weight.size - int(index[8:].view("<u4")[0] & 0x1FF) * 128
    for length in (0, 2, 3, 127):
        changed = weight.copy()
        changed[last + 1] = length
        with pytest.raises(CodecError, match="tile 1"):
            codec.decode_tiles(changed, index, 1024)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(16, 32), (40, 100), (128, 320), (192, 256)]),
    mode=st.sampled_from(["low", "high"]),
    sigma=st.sampled_from([0.3, 3, 12, 90]),
    zeros=st.sampled_from([0, 0.5, 0.9, 1]),
    seed=st.integers(0, 99),
)
def test_encoded_size_is_exact(shape, mode, sigma, zeros, seed):
    weight = gaussian(shape, zeros, sigma, seed)
    stream, sizes = fractal.to_fractal(weight)
    coded, _ = codec.encode_tiles(stream, sizes, mode)
    assert sparse_compress.encoded_size(weight, mode) == coded.size
    assert sparse_compress.encoded_size(stream.tobytes(), mode, tile_bytes=sizes) == coded.size
    assert sparse_compress.encoded_size(stream, mode, backend="reference") % 128 == 0


def test_encoded_size_of_what_no_runtime_takes():
    """A matrix that `compress_matrix` refuses has a size, too: a search may pass by it."""
    weight = np.random.default_rng(0).integers(-128, 128, (192, 512), dtype=np.int8)
    assert sparse_compress.encoded_size(weight) > 192 * 512
    with pytest.raises(MsQuantError, match="int16 of shape"):
        sparse_compress.encoded_size(weight.astype(np.int16))
