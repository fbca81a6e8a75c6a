"""Byte-exact cases, and the worked examples of ``docs/unzip_format.md``."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from sparse_compress import codec
from sparse_compress.codec.format import count_bytes, get_mode, rank_counts

GOLDEN = Path(__file__).parents[1] / "golden" / "unzip"
CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]
NATIVE = pytest.mark.skipif(codec.backend_note() is not None, reason=str(codec.backend_note()))
BACKENDS = [pytest.param("native", marks=NATIVE), "reference"]


def read(name):
    return (np.fromfile(GOLDEN / f"{name}.{part}.bin", np.int8) for part in ("weight", "index"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden(case, backend):
    weight, index = read(case["name"])
    sizes = [case["tile_bytes"]] * case["tiles"]
    options = {"mode": case["mode"], "init_offset": case["init_offset"], "backend": backend}

    stream = codec.decode_tiles(weight, index, sizes, **options)
    assert hashlib.sha256(stream.tobytes()).hexdigest() == case["sha256"]["input"]

    ranked = rank_counts(count_bytes(stream), get_mode(case["mode"]).dictionary_size)
    assert ranked.tobytes().hex() == case["dictionary"]

    again, index_again = codec.encode_tiles(stream, sizes, **options)
    assert again.tobytes() == weight.tobytes()
    assert index_again.tobytes() == index.tobytes()
    coded = (index.view("<u4")[::2] >> 15) & 1
    assert np.flatnonzero(coded == 0).tolist() == case["bypass_tiles"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_of_128_by_320(backend):
    zeros = np.zeros((128, 320), np.int8)
    weight, index, info = codec.compress_matrix(zeros, backend=backend)
    assert index.tobytes().hex(" ", 4) == "33800000 00000000 0e800000 33000000"
    assert weight.size == 6528 + 1792

    # The first tile interleaves its engines by 32 bytes: header, then words of 21 codes 001
    # (two zeros each) and one filling bit.
    first = weight.view(np.uint8)[:6528].reshape(-1, 4, 32)[:, 0].tobytes()
    assert first[:8].hex(" ") == "a8 40 00 01 00 00 02 03"
    assert first[38:40].hex(" ") == "22 23"
    assert first[40:48].hex(" ") == "24 49 92 24 49 92 24 c9"
    # 8192 = 195 x 42 + 2: the last word is 001 and END.
    assert first[40 + 195 * 8 :][:8].hex(" ") == "bc 0f 00 00 00 00 00 00"
    assert not any(first[40 + 196 * 8 :])

    assert not codec.decompress_matrix(weight, index, info, backend=backend).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_in_high_mode(backend):
    weight, _ = codec.encode_tiles(np.zeros(32768, np.uint8), [32768], "high", backend=backend)
    assert weight.size == 4352
    # Seven runs of nine and one zero make a window of 64; the rest of the word stays zero.
    word = weight.view(np.uint8).reshape(-1, 4, 32)[:, 0].reshape(-1)[40:48]
    assert f"{int.from_bytes(word.tobytes(), 'little'):064b}"[::-1] == "101000" * 7 + "0" * 22


@pytest.mark.parametrize("backend", BACKENDS)
def test_init_offset_changes_the_index_only(backend):
    stream = (np.arange(2048) & 7).astype(np.uint8)
    weight, index = codec.encode_tiles(stream, [1024, 1024], backend=backend)
    moved, moved_index = codec.encode_tiles(stream, [1024, 1024], init_offset=129, backend=backend)
    assert moved.tobytes() == weight.tobytes()
    assert (moved_index.view("<u4") - index.view("<u4")).tolist() == [0, 2, 0, 2]


def test_backend_names():
    assert codec.backend_name("reference") == "reference"
    assert codec.backend_name() == ("reference" if codec.backend_note() else "native")
