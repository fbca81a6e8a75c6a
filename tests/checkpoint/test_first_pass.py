"""The pass over a whole source: NaN is found, bytes are hashed, nothing is read twice or mixed."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.files import digest, first_pass
from ms_quant.files.digest import BLOCK_ELEMENTS, count_non_finite, tensor_digest
from ms_quant.files.first_pass import STATE, read_source
from ms_quant.files.reader import ChangedSourceError, Checkpoint
from ms_quant.files.sealed import write_sealed

LAST = "model.layers.1.mlp.up_proj.weight"
Save = Callable[..., None]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_16_bit_pattern(dtype: Any) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(every)
    assert count_non_finite(every) == np.count_nonzero(~finite) > 0
    assert count_non_finite(every[finite]) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.float8_e4m3fn])
def test_wide_and_narrow_types(dtype: Any) -> None:
    largest = float(ml_dtypes.finfo(dtype).max)
    values = np.zeros((2, BLOCK_ELEMENTS + 3), np.float64)
    values[0, :4] = largest, -largest, largest / 2, 1e-40
    array = values.astype(dtype)
    assert count_non_finite(array) == 0
    for place in (0, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, -1):
        array[1, place] = np.nan
    assert count_non_finite(array) == 4
    if dtype != ml_dtypes.float8_e4m3fn:
        array[0, :2] = np.inf, -np.inf
        assert count_non_finite(array) == 6


def test_the_digest_is_of_the_bytes(
    tmp_path: Path, save_tensors: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((37, 11)).astype(ml_dtypes.bfloat16),
        "b": rng.standard_normal(1000).astype(np.float32),
        "c": np.zeros((0, 4), np.float16),
        "d": np.array(2.5, np.float32),
    }
    save_tensors(tmp_path / "model.safetensors", tensors)
    for elements in (1, 50, 1 << 22):
        monkeypatch.setattr(digest, "HASHED_ELEMENTS", elements)
        file = Checkpoint(tmp_path).shard("model.safetensors")
        for name, array in tensors.items():
            assert tensor_digest(file, name) == hashlib.sha256(array.tobytes()).hexdigest()


def test_memory_is_bounded(tmp_path: Path, save_tensors: Save) -> None:
    save_tensors(tmp_path / "model.safetensors", {"a": np.ones((1 << 12, 1 << 12), np.float32)})
    file = Checkpoint(tmp_path).shard("model.safetensors")
    tracemalloc.start()
    tensor_digest(file, "a")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 9 << 20  # of 64 MiB: two pieces of 4 MiB, and little beside them


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "job").mkdir()
    return tmp_path / "job"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that a pass reads from now on."""
    read: list[str] = []

    def watch(file: Any, name: str) -> str:
        read.append(name)
        return tensor_digest(file, name)

    monkeypatch.setattr(first_pass, "tensor_digest", watch)
    return read


def put(path: Path, name: str, value: float, keep_time: bool = True) -> None:
    """Changes one value in a file in place; the time of its last change is set back."""
    file = Checkpoint(path.parent).shard(path.name)
    status = path.stat()
    array = file.read(name)
    array.reshape(-1)[array.size // 2 + 1] = value
    with path.open("r+b") as opened:
        opened.seek(file.info(name).start)
        opened.write(array.tobytes())
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [LAST, "model.embed_tokens.weight", "model.norm.weight"])
def test_a_value_that_is_not_finite_is_named(
    name: str, value: float, shards: int, tiny_model: Callable[..., Path], job: Path
) -> None:
    directory = tiny_model(shards=shards)
    put(Checkpoint(directory).file_of(name).path, name, value)
    with pytest.raises(
        MsQuantError, match=f"'{name}' holds 1 NaN or infinite values of [0-9]+, exp"
    ):
        read_source(Checkpoint(directory), job)


def test_the_first_tensor_in_the_files_is_named(tiny_model: Callable[..., Path], job: Path) -> None:
    directory = tiny_model()
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        put(directory / "model.safetensors", name, np.nan)
    with pytest.raises(MsQuantError, match=r"layers\.0\.mlp\.down_proj"):
        read_source(Checkpoint(directory), job)


def test_progress_ends_at_one(tiny_model: Callable[..., Path], job: Path) -> None:
    told: list[float] = []
    read_source(Checkpoint(tiny_model(shards=2)), job, told.append)
    assert told == sorted(told) and told[-1] == 1.0 and told[0] > 0


@pytest.mark.parametrize("shards", [1, 3])
def test_a_second_pass_reads_nothing_and_trusts_the_first(
    shards: int,
    tiny_model: Callable[..., Path],
    job: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = tiny_model(shards=shards)
    first = read_source(Checkpoint(directory), job)
    assert set(first.digests) == set(Checkpoint(directory).names) and not first.trusted
    read = counted(monkeypatch)
    second = read_source(Checkpoint(directory), job)
    assert read == [] and second.digests == first.digests and second.trusted == set(first.digests)


def test_a_killed_pass_goes_on(
    tiny_model: Callable[..., Path], job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model()
    monkeypatch.setattr(first_pass, "SAVED_BYTES", 1)
    read: list[str] = []

    def interrupted(file: Any, name: str) -> str:
        if name.startswith("model.layers.1."):
            raise KeyboardInterrupt
        read.append(name)
        return tensor_digest(file, name)

    monkeypatch.setattr(first_pass, "tensor_digest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_source(Checkpoint(directory), job)
    (entry,) = json.loads((job / STATE).read_text())["shards"].values()
    kept = set(entry["tensors"])
    assert kept and kept <= set(read)
    again = counted(monkeypatch)
    found = read_source(Checkpoint(directory), job)
    assert set(again) == set(Checkpoint(directory).names) - kept and found.trusted == kept


def test_a_file_that_was_touched_is_read_again(
    tiny_model: Callable[..., Path], job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model(shards=2)
    first = read_source(Checkpoint(directory), job)
    one, two = Checkpoint(directory).files()
    os.utime(one)
    read = counted(monkeypatch)
    second = read_source(Checkpoint(directory), job)
    assert set(read) == set(Checkpoint(directory).shard(one.name).tensors)
    assert second.digests == first.digests
    assert second.trusted == set(Checkpoint(directory).shard(two.name).tensors)


def test_what_tensors_were_outlives_a_killed_pass(
    tiny_model: Callable[..., Path], job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model()
    read_source(Checkpoint(directory), job)
    put(directory / "model.safetensors", LAST, 0.25, keep_time=False)

    def interrupted(file: Any, name: str) -> str:
        if name == LAST:
            raise KeyboardInterrupt
        return tensor_digest(file, name)

    monkeypatch.setattr(first_pass, "SAVED_BYTES", 1)
    monkeypatch.setattr(first_pass, "tensor_digest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_source(Checkpoint(directory), job)
    monkeypatch.setattr(first_pass, "tensor_digest", tensor_digest)
    with pytest.raises(ChangedSourceError, match=f"'{LAST}' changed since the job was begun"):
        read_source(Checkpoint(directory), job)


@pytest.mark.parametrize("keep_time", [True, False])
def test_a_changed_value_is_seen_whatever_the_file_time_says(
    keep_time: bool, tiny_model: Callable[..., Path], job: Path
) -> None:
    directory = tiny_model()
    read_source(Checkpoint(directory), job)
    put(directory / "model.safetensors", LAST, 0.25, keep_time)
    with pytest.raises(ChangedSourceError, match=f"'{LAST}' changed since the job was begun"):
        read_source(Checkpoint(directory), job)


def test_bytes_are_hashed_again_when_they_are_read(
    tiny_model: Callable[..., Path], job: Path
) -> None:
    directory = tiny_model()
    read_source(Checkpoint(directory), job)
    put(directory / "model.safetensors", LAST, 0.25)
    state = json.loads((job / STATE).read_text())
    entry = state["shards"]["model.safetensors"]
    entry["stamp"] = digest.file_stamp(directory / "model.safetensors")  # no clock has told
    write_sealed(job / STATE, {"shards": state["shards"]})
    checkpoint = Checkpoint(directory)
    found = read_source(checkpoint, job)
    checkpoint.expect(found.digests, found.trusted, found.stamps)
    checkpoint.read_float32("model.norm.weight")
    for read in (
        lambda: checkpoint.read_float32(LAST),
        lambda: checkpoint.read(LAST),
        lambda: list(checkpoint.float_chunks(LAST, slice(0, 1))),
    ):
        with pytest.raises(ChangedSourceError, match=f"'{LAST}' changed since the job was begun"):
            read()


def test_a_change_while_the_job_works_is_seen(tiny_model: Callable[..., Path], job: Path) -> None:
    directory = tiny_model()
    checkpoint = Checkpoint(directory)
    found = read_source(checkpoint, job)
    assert not found.trusted
    checkpoint.expect(found.digests, found.trusted, found.stamps)
    checkpoint.read_float32(LAST)
    put(directory / "model.safetensors", LAST, 0.25)
    with pytest.raises(ChangedSourceError, match=f"'{LAST}' changed since the job was begun"):
        checkpoint.read_float32(LAST)
    checkpoint.read_float32("model.norm.weight")
    (directory / "model.safetensors").chmod(0o600)  # another change that is none
    checkpoint.read_float32("model.embed_tokens.weight")


@pytest.mark.parametrize("content", [{}, {"shards": []}, {"shards": {"model.safetensors": 3}}])
def test_a_state_of_another_shape_is_made_again(
    content: Any, tiny_model: Callable[..., Path], job: Path
) -> None:
    directory = tiny_model()
    expected = read_source(Checkpoint(directory), job).digests
    write_sealed(job / STATE, content)
    assert read_source(Checkpoint(directory), job).digests == expected


def test_buffers_of_old_exports_are_not_looked_at(
    tiny_model: Callable[..., Path], job: Path
) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.full(3, np.nan, np.float32)

    assert read_source(Checkpoint(tiny_model(change=change)), job).digests
