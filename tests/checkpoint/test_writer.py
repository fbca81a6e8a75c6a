"""The writer: golden bytes, determinism, and nothing half-written under a final name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant.errors import MsQuantError
from ms_quant.files import atomic
from ms_quant.files.safetensors_file import DTYPES, open_file
from ms_quant.files.writer import (
    FileRecord,
    TensorPlan,
    plan_shards,
    shard_names,
    write_file,
    write_index,
)


def plans_of(arrays: dict[str, np.ndarray]) -> list[TensorPlan]:
    return [TensorPlan(name, array.dtype, array.shape) for name, array in arrays.items()]


def save(path: Path, arrays: dict[str, np.ndarray]) -> FileRecord:
    return write_file(path, plans_of(arrays), lambda plan: arrays[plan.name])


SMALL = {
    "b": np.array([1, -1, 2], np.int8),
    "a": np.array([5], np.uint8),
    "z": np.array([[1.0], [-2.0]], ml_dtypes.bfloat16),
}
# The wide dtype first, though its name is last; the header sorted by name, padded to 8 bytes.
GOLDEN = (
    b"\xa8\x00\x00\x00\x00\x00\x00\x00"
    b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[4,5]},'
    b'"b":{"dtype":"I8","shape":[3],"data_offsets":[5,8]},'
    b'"z":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]}}       '
    b"\x80\x3f\x00\xc0\x05\x01\xff\x02"
)


def test_golden_bytes(tmp_path: Path) -> None:
    record = save(tmp_path / "x.safetensors", SMALL)
    assert (tmp_path / "x.safetensors").read_bytes() == GOLDEN
    assert record == FileRecord("x.safetensors", len(GOLDEN), hashlib.sha256(GOLDEN).hexdigest())
    assert atomic.sha256_file(tmp_path / "x.safetensors") == record.sha256


def test_insertion_order_does_not_matter(tmp_path: Path) -> None:
    for order in (["a", "b", "z"], ["z", "b", "a"], ["b", "z", "a"]):
        save(tmp_path / "x.safetensors", {name: SMALL[name] for name in order})
        assert (tmp_path / "x.safetensors").read_bytes() == GOLDEN


def test_metadata_is_sorted(tmp_path: Path) -> None:
    files = []
    for metadata in ({"b": "1", "a": "2"}, {"a": "2", "b": "1"}):
        path = tmp_path / "x.safetensors"
        write_file(path, plans_of(SMALL), lambda plan: SMALL[plan.name], metadata)
        files.append(path.read_bytes())
    assert files[0] == files[1]
    assert open_file(tmp_path / "x.safetensors").metadata == {"a": "2", "b": "1"}


def test_every_dtype_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    arrays = {code: np.arange(6).reshape(2, 3).astype(dtype) for code, dtype in DTYPES.items()}
    path = tmp_path / "x.safetensors"
    save(path, arrays)
    found = dict(safetensors.deserialize(path.read_bytes()))
    assert set(found) == set(arrays)
    for code, array in arrays.items():
        assert found[code]["dtype"] == code
        assert found[code]["shape"] == [2, 3]
        assert bytes(found[code]["data"]) == array.tobytes()


def test_safe_open_reads_it(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {"w": np.ones((2, 3), np.float16), "s": np.array(3, np.int64)}
    save(tmp_path / "x.safetensors", arrays)
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    arrays = {
        name: np.zeros(3, dtype)
        for name, dtype in (("a", np.int8), ("b", np.float64), ("c", np.float16), ("d", np.int32))
    }
    save(tmp_path / "x.safetensors", arrays)
    for info in open_file(tmp_path / "x.safetensors").tensors.values():
        assert info.start % info.dtype.itemsize == 0


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, np.ndarray]:
    names = draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), unique=True))
    arrays = {}
    for name in names:
        dtype = draw(st.sampled_from([d for code, d in DTYPES.items() if code != "BOOL"]))
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
        size = int(np.prod(shape, dtype=int)) * dtype.itemsize
        raw = draw(st.binary(min_size=size, max_size=size))
        arrays[name] = np.frombuffer(raw, dtype).reshape(shape)
    return arrays


@settings(max_examples=60, deadline=None)
@given(tensor_sets())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("round") / "x.safetensors"
    record = save(path, arrays)
    file = open_file(path)
    assert record.bytes == file.size == path.stat().st_size
    assert file.data_start % 8 == 0
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        found = file.read(name)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()  # bits, as NaN is not equal to itself


def test_a_transposed_array_is_written_in_c_order(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3).T
    save(tmp_path / "x.safetensors", {"a": array})
    np.testing.assert_array_equal(open_file(tmp_path / "x.safetensors").read("a"), array)


@pytest.mark.parametrize("array", [np.zeros(3, np.float16), np.zeros((3, 1), np.float32)])
def test_an_array_that_differs_from_its_plan(tmp_path: Path, array: np.ndarray) -> None:
    plan = TensorPlan("a", np.dtype(np.float32), (3,))
    with pytest.raises(MsQuantError, match=r"tensor 'a' is .*, expected float32 \[3\]"):
        write_file(tmp_path / "x.safetensors", [plan], lambda _: array)
    assert list(tmp_path.iterdir()) == []


def test_pieces_of_rows_give_the_same_file(tmp_path: Path) -> None:
    array = np.arange(15, dtype=np.int32).reshape(5, 3)
    whole = save(tmp_path / "whole", {"a": array})
    for step in (1, 2, 5):
        pieces = [array[start : start + step] for start in range(0, 5, step)]
        record = write_file(tmp_path / "pieces", plans_of({"a": array}), lambda _: iter(pieces))  # noqa: B023
        assert record.sha256 == whole.sha256


@pytest.mark.parametrize(
    "pieces",
    [[np.zeros((2, 3), np.int8)], [np.zeros((2, 3), np.int8)] * 3, [np.zeros((4, 2), np.int8)], []],
)
def test_pieces_that_differ_from_their_plan(tmp_path: Path, pieces: list[np.ndarray]) -> None:
    plan = TensorPlan("a", np.dtype(np.int8), (4, 3))
    with pytest.raises(MsQuantError, match=r"tensor 'a' is .*, expected int8 \[4, 3\]"):
        write_file(tmp_path / "x.safetensors", [plan], lambda _: iter(pieces))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "dtype"), [("a", ml_dtypes.int4), ("a", np.complex64), ("__metadata__", np.int8)]
)
def test_what_cannot_be_stored(tmp_path: Path, name: str, dtype: Any) -> None:
    with pytest.raises(MsQuantError, match="cannot be stored"):
        save(tmp_path / "x.safetensors", {name: np.zeros(2, dtype)})
    assert list(tmp_path.iterdir()) == []


def test_duplicate_plans(tmp_path: Path) -> None:
    plan = TensorPlan("a", np.dtype(np.int8), (1,))
    with pytest.raises(MsQuantError, match="'a' is planned twice"):
        write_file(tmp_path / "x.safetensors", [plan, plan], lambda _: np.zeros(1, np.int8))
    with pytest.raises(MsQuantError, match="'a' is planned twice"):
        plan_shards([plan, plan], 10)
    with pytest.raises(MsQuantError, match="'a' is planned twice"):
        write_index(tmp_path, {"1.safetensors": [plan], "2.safetensors": [plan]}, 2)


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, SMALL)

    def fail(plan: TensorPlan) -> np.ndarray:
        if plan.name == "b":
            raise KeyboardInterrupt
        return SMALL[plan.name]

    with pytest.raises(KeyboardInterrupt):
        write_file(path, plans_of(SMALL), fail)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_bytes() == GOLDEN


def test_a_killed_write_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, numpy as np\n"
        "from ms_quant.files.writer import TensorPlan, write_file\n"
        "plans = [TensorPlan(n, np.dtype('int8'), (1 << 16,)) for n in 'ab']\n"
        "def get(plan):\n"
        "    if plan.name == 'b':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return np.zeros(1 << 16, np.int8)\n"
        "write_file(sys.argv[1], plans, get)\n"
    )
    path = tmp_path / "x.safetensors"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=root, check=False)
    assert done.returncode == -9
    assert not path.exists()
    assert [p.suffix for p in tmp_path.iterdir()] == [".tmp"]


def test_a_full_disk_at_fsync_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(MsQuantError, match="no space left on device"):
        save(tmp_path / "x.safetensors", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MsQuantError, match="writing the file failed"):
        save(tmp_path / "none" / "x.safetensors", SMALL)


def test_errors_of_the_source_are_not_called_write_errors(tmp_path: Path) -> None:
    def fail(plan: TensorPlan) -> np.ndarray:
        raise OSError(errno.ENOSPC, "from elsewhere")

    with pytest.raises(OSError, match="from elsewhere"):
        write_file(tmp_path / "x.safetensors", plans_of(SMALL), fail)


def sizes(shards: list[list[TensorPlan]]) -> list[list[int]]:
    return [[plan.bytes for plan in shard] for shard in shards]


@pytest.mark.parametrize(
    ("counts", "limit", "expected"),
    [
        ([4, 4, 4], 8, [[4, 4], [4]]),
        ([4, 9, 4], 8, [[4], [9], [4]]),  # too large for any shard: one of its own
        ([9, 1], 8, [[9], [1]]),
        ([0, 8, 0], 8, [[0, 8, 0]]),
        ([], 8, [[]]),
    ],
)
def test_plan_shards(counts: list[int], limit: int, expected: list[list[int]]) -> None:
    plans = [TensorPlan(str(i), np.dtype(np.int8), (n,)) for i, n in enumerate(counts)]
    shards = plan_shards(plans, limit)
    assert sizes(shards) == expected
    assert [plan for shard in shards for plan in shard] == plans


def test_plan_shards_needs_room() -> None:
    with pytest.raises(MsQuantError, match="shard_bytes is 0"):
        plan_shards([], 0)


def test_shard_names() -> None:
    assert shard_names("model", 2) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_write_index(tmp_path: Path) -> None:
    plans = {name: TensorPlan(name, np.dtype(np.int8), (1,)) for name in "abc"}
    write_index(tmp_path, {"1.safetensors": [plans["c"], plans["a"]], "2.safetensors": []}, 2)
    text = (tmp_path / "model.safetensors.index.json").read_text()
    assert json.loads(text)["metadata"] == {"total_size": 2}
    assert list(json.loads(text)["weight_map"].items()) == [
        ("a", "1.safetensors"),
        ("c", "1.safetensors"),
    ]
    assert text.endswith("}\n")
