"""The strict header parser: golden bytes, round trips, and one test for each defect."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ms_quant.errors import MsQuantError
from ms_quant.files.safetensors_file import MAX_HEADER_BYTES, open_file


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def put(tmp_path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


GOOD = {"a": entry("F32", [2, 3], 0, 24), "b": entry("I8", [2], 24, 26)}
GOOD_DATA = np.arange(6, dtype="<f4").tobytes() + b"\x01\xff"


def test_reads_golden_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(
        b"\x43\x00\x00\x00\x00\x00\x00\x00"  # header length 67, little-endian
        b'{"w":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]}          }'
        b"\x80\x3f\x00\xc0"  # 1.0 and -2.0 in bfloat16
    )
    file = open_file(path)
    array = file.read("w")
    assert (file.data_start, file.size) == (75, 79)
    assert array.dtype == ml_dtypes.bfloat16
    assert array.astype(np.float32).tolist() == [[1.0], [-2.0]]
    assert array.flags.owndata or array.base is None


def test_reads_values_rows_and_metadata(tmp_path: Path) -> None:
    file = open_file(put(tmp_path, {"__metadata__": {"format": "pt"}, **GOOD}, GOOD_DATA))
    assert file.metadata == {"format": "pt"}
    assert list(file.tensors) == ["a", "b"]
    assert file.read("a").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert file.read("b").tolist() == [1, -1]
    assert file.read_rows("a", 1, 2).tolist() == [[3, 4, 5]]
    assert file.read_rows("a", 1, 1).shape == (0, 3)


def test_reads_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {
        "a": np.arange(3, dtype=np.int8),
        "b": np.eye(2, dtype=np.float32),
    }
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(arrays, path, {"format": "np"})
    file = open_file(path)
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.read(name), array)


def test_reads_no_tensors_scalars_and_empty_tensors(tmp_path: Path) -> None:
    assert open_file(put(tmp_path, {})).tensors == {}
    header = {"s": entry("F32", [], 0, 4), "z": entry("F32", [0, 5], 4, 4)}
    file = open_file(put(tmp_path, header, struct.pack("<f", 1.5)))
    assert file.read("s") == np.float32(1.5)
    assert file.read("s").shape == ()
    assert file.read("z").shape == (0, 5)


@pytest.mark.parametrize("keep", range(8))
def test_shorter_than_the_length_field(tmp_path: Path, keep: int) -> None:
    path = put(tmp_path, GOOD, GOOD_DATA)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MsQuantError, match=f"truncated, {keep} bytes, expected at least 8"):
        open_file(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path, GOOD, GOOD_DATA)
    whole = path.read_bytes()
    for keep in range(8, len(whole)):
        path.write_bytes(whole[:keep])
        with pytest.raises(MsQuantError, match=rf"x\.safetensors: truncated, {keep} bytes"):
            open_file(path)


def test_truncated_data_names_both_sizes(tmp_path: Path) -> None:
    path = put(tmp_path, GOOD, GOOD_DATA[:-1])
    size = path.stat().st_size
    with pytest.raises(MsQuantError, match=f"truncated, {size} bytes, expected {size + 1}$"):
        open_file(path)


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    with pytest.raises(MsQuantError, match="too long"):
        open_file(put(tmp_path, GOOD, GOOD_DATA + b"\0"))


def test_header_length_over_the_cap(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}")
    with pytest.raises(MsQuantError, match="not a safetensors file"):
        open_file(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MsQuantError, match="no such file"):
        open_file(tmp_path / "x.safetensors")
    with pytest.raises(MsQuantError, match="is a directory, expected a file"):
        open_file(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "not valid JSON"),
        (b'{"a":1\xff}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":NaN}', "not valid JSON"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "more than 64 levels of nesting"),
        (b"[]", "JSON list, expected an object"),
        (b'{"a":{},"a":{}}', "'a' appears twice"),
        (b'{"\\ud800":{}}', "not valid JSON"),
        (b'{"__metadata__":{"a":1}}', "__metadata__"),
        (b'{"__metadata__":3}', "__metadata__"),
        (b'{"a":3}', "expected dtype, shape, data_offsets"),
        (b'{"a":{"dtype":"F32"}}', "expected dtype, shape, data_offsets"),
    ],
)
def test_malformed_header(tmp_path: Path, header: bytes, message: str) -> None:
    with pytest.raises(MsQuantError, match=message):
        open_file(put(tmp_path, header))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (entry("F31", [1], 0, 4), "dtype 'F31'"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "dtype"),
        (entry("F32", [-1], 0, 4), "non-negative"),
        (entry("F32", [True], 0, 4), "non-negative"),
        ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, "non-negative"),
        ({"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}, "non-negative"),
        (entry("F32", [1] * 33, 0, 4), "non-negative"),
        (entry("F32", [0, 1 << 62, 1 << 62], 0, 0), "values"),
        (entry("F32", [1], 4, 0), r"expected \[start, stop\]"),
        (entry("F32", [1], -4, 0), r"expected \[start, stop\]"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, r"expected \[start, stop\]"),
        (entry("F32", [1], 0, 3), "span 3 bytes, expected 4 for F32"),
        (entry("F32", [1 << 40], 0, 1 << 42), "truncated"),
        (entry("F32", [1], 1, 5), "leaves a hole"),
    ],
)
def test_malformed_tensor(tmp_path: Path, tensor: Any, message: str) -> None:
    with pytest.raises(MsQuantError, match=message):
        open_file(put(tmp_path, {"t": tensor}, b"\0" * 4))


def test_overlap(tmp_path: Path) -> None:
    header = {"a": entry("I8", [3], 0, 3), "b": entry("I8", [2], 2, 4)}
    with pytest.raises(MsQuantError, match="'b' overlaps the tensor before it"):
        open_file(put(tmp_path, header, b"\0" * 4))


def test_two_tensors_in_the_same_bytes(tmp_path: Path) -> None:
    header = {"a": entry("I8", [4], 0, 4), "b": entry("I8", [4], 0, 4)}
    with pytest.raises(MsQuantError, match="overlaps"):
        open_file(put(tmp_path, header, b"\0" * 4))


def test_unknown_tensor_and_rows_outside(tmp_path: Path) -> None:
    header = {"a": entry("I8", [2], 0, 2), "s": entry("I8", [], 2, 3)}
    file = open_file(put(tmp_path, header, b"\0" * 3))
    with pytest.raises(MsQuantError, match="has no tensor 'c'"):
        file.read("c")
    for name, start, stop in (("a", 0, 3), ("a", -1, 1), ("a", 2, 1), ("s", 0, 0)):
        with pytest.raises(MsQuantError, match=f"expected rows {start} to {stop}"):
            file.read_rows(name, start, stop)


def test_file_replaced_after_opening(tmp_path: Path) -> None:
    path = put(tmp_path, GOOD, GOOD_DATA)
    file = open_file(path)
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())
    other.replace(path)
    with pytest.raises(MsQuantError, match="changed since it was opened"):
        file.read("a")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_unreadable_file(tmp_path: Path) -> None:
    path = put(tmp_path, GOOD, GOOD_DATA)
    path.chmod(0)
    with pytest.raises(MsQuantError, match="cannot be read"):
        open_file(path)


def test_random_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    whole = bytearray(put(tmp_path, GOOD, GOOD_DATA).read_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / "fuzz.safetensors"
    for _ in range(500):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            file = open_file(path)
        except MsQuantError:
            continue
        for name in file.tensors:
            file.read(name)
