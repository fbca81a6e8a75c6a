"""What a job or an output in progress holds is damaged between a kill and the next start."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moments import bounded, flip, moments, mutate, put_back, work_files
from routed_models import QWEN, save_routed

from ms_quant.analysis.run import analyze
from ms_quant.errors import MsQuantError
from ms_quant.files.checked_file import CheckedFile, DamagedFileError, write_checked
from ms_quant.job.directory import JobDirectory
from ms_quant.job.states import HiddenStates, StoredStates
from ms_quant.job.written import WRITTEN
from ms_quant.pipeline.quantize import quantize_checkpoint

Contents = Callable[[Path], dict[str, bytes]]


def ids(path: Path) -> Path:
    tokens = np.random.default_rng(0).integers(0, 256, (4, 16)).astype(np.int32)
    np.savez(path, tokens=tokens)
    return path


class Work:
    """A command, what it ends with undisturbed, and what it has on the disk on the way."""

    def __init__(self, directory: Path, act: Callable[[Path], Any], contents: Contents):
        self.place, self.contents = directory / "work", contents
        self.place.mkdir(parents=True)
        self.act = lambda: act(self.place / "out")
        self.moments = moments(self.place, self.act, directory / "moments")
        self.expected = contents(self.place)

    def again(self) -> bool:
        """Goes on; whether it ended as it does undisturbed, or in a sentence."""
        try:
            with bounded(60):
                self.act()
        except MsQuantError as error:
            assert "\n" not in str(error) and "internal" not in str(error)
            return False
        assert self.contents(self.place) == self.expected
        return True


def dense(directory: Path, model: Path, contents: Contents) -> Work:
    calib = ids(directory / "ids.npz")

    def act(output: Path) -> None:
        quantize_checkpoint(
            model, output, "W8A8", calibration=calib, samples=4, seq_len=16, shard_bytes=9000
        )

    return Work(directory, act, contents)


def routed(directory: Path, contents: Contents, *, calibrated: bool) -> Work:
    raw = {**QWEN, "num_hidden_layers": 2, "num_experts": 4}
    model, data = save_routed(directory / "model", raw), dict[str, Any]()
    if calibrated:
        data = {"calibration": ids(directory / "ids.npz"), "samples": 4, "seq_len": 16}

    def act(output: Path) -> None:
        scheme = "W8A8" if calibrated else "W8A8_DYNAMIC"
        quantize_checkpoint(model, output, scheme, shard_bytes=60_000, **data)

    return Work(directory, act, contents)


@pytest.fixture
def dense_work(tmp_path: Path, tiny_model: Callable[..., Path], file_contents: Contents) -> Work:
    return dense(tmp_path, tiny_model(), file_contents)


def _flips(work: Work, wanted: str, seed: int, times: int = 1) -> int:
    """Flips a bit of each file of a kind in the last moment that has one; how many there were."""
    rng, done = random.Random(seed), 0
    last = dict[str, Path]()
    for moment in work.moments:
        for path in work_files(moment):
            if path.match(wanted):
                last[str(path.relative_to(moment))] = moment
    for name, moment in last.items():
        for _ in range(times):
            put_back(moment, work.place)
            path = work.place / name
            flip(path, rng.randrange(8 * path.stat().st_size))
            assert work.again()
            done += 1
    return done


@pytest.mark.parametrize("wanted", ["block-*.safetensors", "hidden-*.npy", "*-of-*.safetensors"])
def test_a_flipped_bit_changes_no_output(dense_work: Work, wanted: str) -> None:
    assert _flips(dense_work, wanted, 1, times=3) >= 2 * 3


def test_every_byte_of_states_and_blocks_counts(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = np.random.default_rng(0).standard_normal((5, 3, 2)).astype(np.float32)
    states, block = tmp_path / "hidden-00001.npy", tmp_path / "block-00001.safetensors"
    hidden = HiddenStates(states, rows.shape)
    hidden.append(rows)
    hidden.commit()
    arrays = {"a": rows, "empty": rows[:0], "b.c": np.arange(7, dtype=np.int8)}
    write_checked(block, arrays, {"notes": "{}"})

    def read(path: Path) -> None:
        if path == states:
            np.testing.assert_array_equal(StoredStates(path, rows.shape)[:], rows)
        else:
            file = CheckedFile(path)
            for name in arrays:
                np.testing.assert_array_equal(file.read(name), arrays[name])

    for path in (states, block):
        read(path)
        good = path.read_bytes()
        for byte in range(len(good)):
            flip(path, 8 * byte + rng.randrange(8))
            with pytest.raises(MsQuantError, match=rf"{path.name}: "):
                read(path)
            path.write_bytes(good)
        for size in range(len(good)):
            path.write_bytes(good[:size])
            with pytest.raises(DamagedFileError, match=rf"{path.name}: is damaged"):
                read(path)
        path.write_bytes(good)
        other = path.with_name(path.name.replace("1", "2"))
        path.rename(other)  # one file is not taken for another
        with pytest.raises(DamagedFileError, match="is damaged"):
            StoredStates(other, rows.shape) if path == states else CheckedFile(other)
    with pytest.raises(DamagedFileError, match=r"hidden-00009\.npy: is damaged \(cannot be read"):
        StoredStates(tmp_path / "hidden-00009.npy", rows.shape)


def test_pieces_of_states_are_checked_when_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ms_quant.job.states.PIECE_BYTES", 2 * 3 * 2 * 4)  # two rows
    rows = np.random.default_rng(0).standard_normal((5, 3, 2)).astype(np.float32)
    path = tmp_path / "hidden-00001.npy"
    hidden = HiddenStates(path, rows.shape)
    for part in (rows[:1], rows[1:4], rows[4]):  # which end where no piece does
        hidden.append(part)
    hidden.commit()
    np.testing.assert_array_equal(StoredStates(path, rows.shape)[:], rows)
    np.testing.assert_array_equal(StoredStates(path, rows.shape)[1:4], rows[1:4])
    flip(path, 8 * (128 + 4 * 6 * 3))  # in row 3
    stored = StoredStates(path, rows.shape)
    np.testing.assert_array_equal(stored[0:2], rows[0:2])
    np.testing.assert_array_equal(stored[4:5], rows[4:5])
    tokens = np.array([0, 5, 14])
    np.testing.assert_array_equal(stored.take(tokens), rows.reshape(15, 2)[tokens])
    for read in (lambda: stored[2:3], lambda: stored.take(np.array([9]))):
        with pytest.raises(DamagedFileError, match="its numbers have changed"):
            read()


def test_damage_is_said_in_one_line_and_made_again(
    dense_work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    work = dense_work
    moment = next(
        m for m in reversed(work.moments) if (m / "out.job" / "hidden-00001.npy").exists()
    )
    put_back(moment, work.place)
    path = work.place / "out.job" / "hidden-00001.npy"
    flip(path, 8 * (path.stat().st_size - 20))
    with caplog.at_level(logging.WARNING):
        assert work.again()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{path}: is damaged (") and said.endswith("; it is made again")


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_of_experts(tmp_path: Path, file_contents: Contents) -> None:
    work = routed(tmp_path, file_contents, calibrated=True)
    for wanted in ("stream-*", "routes-*", "seen-*", "given-*", "block-*-expert-*"):
        assert _flips(work, wanted, 3), wanted


def test_a_flipped_bit_in_a_file_that_grows(tmp_path: Path, file_contents: Contents) -> None:
    work = routed(tmp_path, file_contents, calibrated=False)
    assert _flips(work, "*-of-*.safetensors", 3)
    for wanted in (".*.placed", ".*.placed.json"):
        assert _flips(work, wanted, 4, times=4), wanted


def test_mutations_of_anything_end_well(dense_work: Work) -> None:
    """Each ends with the same bytes or in one sentence, within seconds."""
    rng, ended = random.Random(11), [0, 0]
    for _ in range(40):
        moment = rng.choice(dense_work.moments)
        put_back(moment, dense_work.place)
        files = work_files(dense_work.place)
        if files:
            mutate(rng.choice(files), rng)
            ended[dense_work.again()] += 1
    assert min(ended) > 3


def test_a_job_of_an_earlier_version_is_named(
    dense_work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import save_file

    moment = next(m for m in dense_work.moments if list(m.glob("out.job/block-00000*")))
    put_back(moment, dense_work.place)
    path = dense_work.place / "out.job" / "block-00000.safetensors"
    file = CheckedFile(path)
    save_file({name: file.read(name) for name in file.tensors}, path, file.metadata)
    with pytest.raises(MsQuantError, match=r"has no checksums, .* delete .*job to start again"):
        dense_work.act()


PLANTED = {
    "the job": "out.job",
    "a block": "out.job/block-00000.safetensors",
    "the lock": "out.job/ms_quant.lock",
    "a temporary": f"out.job/.job.json.{os.getpid()}.tmp",
    "the record": "out.job/job.json",
    "the source": "out.job/source.json",
    "the output in progress": "out.partial",
    "its record": "out.partial/ms_quant.json",
    "a shard": "out.partial/model-00001-of-00002.safetensors",
    "the list": f"out.partial/{WRITTEN}",
    "a rank": "out.partial/rank_0",
    "the output": "out",
}


@pytest.mark.parametrize("name", PLANTED)
def test_no_link_is_followed(dense_work: Work, tmp_path: Path, name: str) -> None:
    work, outside = dense_work, tmp_path / "outside"
    moment = next(m for m in reversed(work.moments) if (m / "out.partial").exists())
    for target in ("directory", "file"):
        put_back(moment, work.place)
        (outside / "directory").mkdir(parents=True, exist_ok=True)
        (outside / "file").write_bytes(b"mine")
        place = work.place / PLANTED[name]
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        place.symlink_to(outside / target)
        with pytest.raises(MsQuantError, match=r"symbolic link|exists and is a file|other content"):
            work.act()
        assert place.is_symlink() and (outside / "file").read_bytes() == b"mine"
        assert not list((outside / "directory").iterdir())


def test_a_link_on_the_way_to_the_output_is_followed(
    tmp_path: Path, tiny_model: Callable[..., Path], file_contents: Contents
) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "near").symlink_to(tmp_path / "far")
    quantize_checkpoint(tiny_model(), tmp_path / "near" / "out", "W8A8_DYNAMIC")
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["pipe", "directory"])
@pytest.mark.parametrize("name", ["block-00000.safetensors", "hidden-00001.npy", "job.json"])
def test_what_is_no_file_is_named_at_once(tmp_path: Path, name: str, kind: str) -> None:
    job = JobDirectory(tmp_path / "job", {})
    with job.open():
        pass
    path = job.directory / name
    path.unlink(missing_ok=True)
    path.mkdir() if kind == "directory" else os.mkfifo(path)
    with (
        bounded(10),
        pytest.raises(MsQuantError, match=rf"{name}: is a {kind}, expected a file of this job"),
    ):
        JobDirectory(tmp_path / "job", {})


@pytest.mark.slow
def test_an_analysis_ends_well_whatever_is_damaged(
    tmp_path: Path, tiny_model: Callable[..., Path], file_contents: Contents
) -> None:
    model, calib = tiny_model(), ids(tmp_path / "ids.npz")

    def act(output: Path) -> None:
        analyze(model, calib, ["W8A8"], output=output.with_suffix(".json"), samples=4, seq_len=16)

    def without_seconds(place: Path) -> dict[str, bytes]:
        found = file_contents(place)
        return {name: data.split(b'"seconds"')[0] for name, data in found.items()}

    work = Work(tmp_path, act, without_seconds)
    rng, ended = random.Random(2), [0, 0]
    for _ in range(25):
        put_back(rng.choice(work.moments), work.place)
        files = work_files(work.place)
        if files:
            mutate(rng.choice(files), rng)
            ended[work.again()] += 1
    assert min(ended) > 1
