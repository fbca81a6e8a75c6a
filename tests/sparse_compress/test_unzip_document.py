"""The bytes of ``docs/unzip_format.md`` are those of the codec."""

import re
from pathlib import Path

import numpy as np
import pytest

from sparse_compress import codec

NATIVE = pytest.mark.skipif(codec.backend_note() is not None, reason=str(codec.backend_note()))
BACKENDS = [pytest.param("native", marks=NATIVE), "reference"]
DOCUMENT = (Path(__file__).parents[2] / "docs" / "unzip_format.md").read_text()


def blocks():
    """The hex blocks of the document by title; each line starts with its position."""
    found = {}
    for title, body in re.findall(r"^```hex ([^\n]*)\n(.*?)^```", DOCUMENT, re.S | re.M):
        data = b""
        for line in body.splitlines():
            position, _, digits = line.strip().partition(" ")
            assert int(position) == len(data), title
            data += bytes.fromhex(digits)
        found[title] = data
    return found


def example():
    weight = np.zeros((16, 32), np.int8)
    weight[0] = np.arange(32)
    weight[range(1, 15), range(1, 15)] = np.arange(1, 15)
    weight[15, 15] = -15
    weight[15, 16:] = np.arange(80, 96)
    return weight


def engine(stored, number):
    return stored.view(np.uint8).reshape(-1, 4, 32)[:, number].tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_worked_example(backend):
    expected, weight = blocks(), example()
    rows = weight[[0, 1, 8, 9]].tobytes()
    assert expected.pop("engine 0, raw") == rows
    packed = codec.compress_matrix(weight, backend=backend)
    first = engine(packed.weight, 0)
    assert expected.pop("engine 0, header") == first[:40]
    assert expected.pop("engine 0, words") == first[40:]
    assert expected.pop("weight") == packed.weight.tobytes()
    assert expected.pop("index") == packed.index.tobytes()
    assert not expected
    assert np.array_equal(codec.decompress_matrix(*packed, backend=backend), weight)


def spelled(number):
    """The words that a table of the example spells: the codes are on every second line."""
    section = DOCUMENT[DOCUMENT.index("**Words** of engine 0") : DOCUMENT.index("**Bypass.** The")]
    fences = re.findall(r"^```([^\n]*)\n(.*?)^```", section, re.S | re.M)
    table = [body for title, body in fences if not title][0 if number == 0 else 1]
    words = []
    for line in table.splitlines()[1::2]:
        line = re.sub(r"([01]+) x (\d+)", lambda match: match[1] * int(match[2]), line)
        bits = "".join(re.findall(r"\b[01]+\b", line))
        words.append(int(bits.ljust(64, "0")[::-1], 2).to_bytes(8, "little"))
    return b"".join(words)


@pytest.mark.parametrize("number", [0, 3])
def test_the_codes_of_the_worked_example(number):
    assert spelled(number) == engine(codec.compress_matrix(example()).weight, number)[40:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_high_mode_and_bypass(backend):
    zeros, _ = codec.encode_tiles(bytes(32768), 32768, "high", backend=backend)
    assert f"**{zeros.size:,}**" in DOCUMENT[DOCUMENT.index("## 6. High mode") :]
    raw = np.tile(np.arange(256, dtype=np.uint8), 32)
    weight, index = codec.encode_tiles(raw, 8192, backend=backend)
    assert f"`{index.tobytes().hex(' ')}`" in DOCUMENT
    places = np.r_[0:32, 64:96, 128:160, 192:224]
    assert weight.view(np.uint8)[:128].tolist() == raw[places].tolist()
