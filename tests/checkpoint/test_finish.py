"""The output directory: named when whole, proved by its record, never in another's place."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.files.atomic import write_bytes, write_json
from ms_quant.files.companion_files import companion_files
from ms_quant.job.output_directory import (
    RECORD,
    OutputDirectory,
    check_files,
    seal,
)
from ms_quant.job.unlisted import unlisted_problems

JOB = {"scheme": "W8A8", "environment": {"threads": 2}}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "tokenizer.json").write_bytes(b"{}\r\n\xff")
    (directory / "LICENSE").write_text("terms")
    (directory / "model.safetensors").write_text("weights are not copied")
    (directory / "README.md").write_text("neither is this")
    return directory


@pytest.fixture
def finished(tmp_path: Path, source: Path) -> Path:
    output = OutputDirectory(tmp_path / "out", JOB, copied=companion_files(source))
    with output.open():
        (output.partial / "rank_0").mkdir()
        files = [
            output.write_once("z.bin", lambda path: write_bytes(path, b"data")),
            output.write_once("rank_0/b.bin", lambda path: write_bytes(path, b"inner")),
        ]
        output.finish(files, source, {"chosen": {"block 0": {}}})
    return tmp_path / "out"


def begin(path: Path, record: dict = JOB) -> Path:
    """The partial directory of an output that some process began and left."""
    output = OutputDirectory(path, record)
    with output.open():
        return output.partial


def rewrite(directory: Path, **changes: object) -> None:
    """Changes the record and seals it again."""
    value = json.loads((directory / RECORD).read_text())
    del value["sha256"]
    write_json(directory / RECORD, seal({**value, **changes}))


def test_finished_directory_and_its_record(finished: Path, source: Path) -> None:
    names = sorted(str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file())
    assert names == ["LICENSE", RECORD, "rank_0/b.bin", "tokenizer.json", "z.bin"]
    assert (finished / "tokenizer.json").read_bytes() == b"{}\r\n\xff"
    record = json.loads((finished / RECORD).read_text())
    assert list(record) == ["record", "chosen", "files", "sha256"]
    assert record["record"] == JOB
    assert list(record["files"]) == ["LICENSE", "rank_0/b.bin", "tokenizer.json", "z.bin"]
    assert record["files"]["z.bin"] == {
        "bytes": 4,
        # sha256 of b"data"
        "sha256": "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7",
    }
    assert check_files(finished) == unlisted_problems(finished, []) == []
    assert OutputDirectory(finished, JOB).finished
    assert not finished.with_name("out.partial").exists()


def test_other_content_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert not OutputDirectory(tmp_path / "out", JOB).finished  # empty is as good as new
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(MsQuantError, match="out: exists with other content, expected a new or"):
        OutputDirectory(tmp_path / "out", JOB)
    (tmp_path / "file").write_text("")
    with pytest.raises(MsQuantError, match="file: exists and is a file"):
        OutputDirectory(tmp_path / "file", JOB)
    assert (tmp_path / "out" / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["", "/", ".."])
def test_an_output_without_a_name_is_refused(name: str) -> None:
    with pytest.raises(MsQuantError, match="has no name, expected a directory to make"):
        OutputDirectory(Path(name), JOB)


def test_output_of_another_job_is_refused_with_both_values(finished: Path) -> None:
    with pytest.raises(MsQuantError, match="made with scheme = 'W8A8', now scheme is 'X'"):
        OutputDirectory(finished, {**JOB, "scheme": "X"})
    other = {**JOB, "environment": {"threads": 8}}
    with pytest.raises(MsQuantError, match=r"environment\.threads = 2, now .* is 8"):
        OutputDirectory(finished, other)
    assert OutputDirectory(finished, other, any_environment=True).finished


def test_partial_directory_of_someone_else_is_refused_and_kept(tmp_path: Path) -> None:
    mine = tmp_path / "out.partial" / "thesis.tex"
    mine.parent.mkdir()
    mine.write_text("years of work")
    for _ in range(2):
        with pytest.raises(MsQuantError, match=r"out\.partial: exists with other content"):
            OutputDirectory(tmp_path / "out", JOB)
        (tmp_path / "out").mkdir(exist_ok=True)  # an empty output changes nothing
    assert mine.read_text() == "years of work"


SHARD = "quant-model-00001-of-00001.safetensors"


def test_files_of_the_same_job_stay_and_those_of_another_go(tmp_path: Path) -> None:
    partial = begin(tmp_path / "out")
    (partial / SHARD).write_text("whole")
    (partial / ".config.json.17.tmp").write_text("half")
    (partial / "rank_0").mkdir()
    (partial / "rank_0" / ".model-00001-of-00002.safetensors.17.tmp").write_text("half")
    assert OutputDirectory(tmp_path / "out", JOB).bytes_present() > len("whole")
    begin(tmp_path / "out")
    found = sorted(path.name for path in partial.rglob("*") if path.is_file())
    assert found == [RECORD, SHARD]
    other = {**JOB, "scheme": "X"}
    assert OutputDirectory(tmp_path / "out", other).bytes_present() == 0
    begin(tmp_path / "out", other)
    assert [path.name for path in partial.iterdir()] == [RECORD]
    assert json.loads((partial / RECORD).read_text()) == {"record": other}


@pytest.mark.parametrize("name", ["thesis.tex", ".env.tmp", ".git/config", "rank_0/notes"])
def test_files_of_someone_else_keep_another_jobs_partial_directory(
    tmp_path: Path, name: str
) -> None:
    partial = begin(tmp_path / "out")
    mine = partial / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(MsQuantError, match=r"out\.partial: exists with other content"):
        OutputDirectory(tmp_path / "out", {"scheme": "X"})
    begin(tmp_path / "out")
    assert mine.read_text() == "mine"


def test_a_whole_output_under_the_partial_name_is_kept(finished: Path) -> None:
    kept = finished.rename(finished.with_name("out.partial"))
    with pytest.raises(MsQuantError, match=r"out\.partial: exists with other content"):
        OutputDirectory(finished, {**JOB, "scheme": "X"})
    assert check_files(kept) == []


def test_a_kill_while_another_jobs_files_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = begin(tmp_path / "out")
    for name in ("config.json", SHARD):
        (partial / name).write_text("")
    unlink = Path.unlink

    def stopped(path: Path, missing_ok: bool = False) -> None:
        if path.name == RECORD:
            raise OSError(errno.EIO, "stopped here")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", stopped)
    with pytest.raises(MsQuantError, match="stopped here"):
        begin(tmp_path / "out", {"scheme": "X"})
    monkeypatch.undo()
    assert [path.name for path in partial.iterdir()] == [RECORD]  # still ours
    begin(tmp_path / "out", {"scheme": "X"})


def test_a_second_process_with_the_same_output_is_refused(tmp_path: Path) -> None:
    with (
        OutputDirectory(tmp_path / "out", JOB).open(),
        pytest.raises(MsQuantError, match="another process works on this job"),
    ):
        begin(tmp_path / "out")
    begin(tmp_path / "out")


@pytest.mark.parametrize("target", ["nowhere", "empty"])
@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_a_symbolic_link_is_refused(tmp_path: Path, target: str, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / name).symlink_to(tmp_path / target)
    with pytest.raises(MsQuantError, match=f"{name}: is a symbolic link, expected a directory"):
        OutputDirectory(tmp_path / "out", JOB)


def test_a_symbolic_link_to_a_finished_output_will_do(finished: Path) -> None:
    finished.with_name("link").symlink_to(finished)
    assert OutputDirectory(finished.with_name("link"), JOB).finished


def test_a_finished_output_with_a_file_missing_or_cut_is_refused(finished: Path) -> None:
    path = finished / "z.bin"
    path.write_bytes(b"dat")
    with pytest.raises(MsQuantError, match=r"z\.bin: 3 bytes, expected 4; delete .*out to make"):
        OutputDirectory(finished, JOB)
    path.unlink()
    with pytest.raises(MsQuantError, match=r"z\.bin: no such file, expected as ms_quant\.json li"):
        OutputDirectory(finished, JOB)
    write_json(finished / RECORD, {"record": JOB})
    with pytest.raises(MsQuantError, match=r"ms_quant\.json: lists no files; delete"):
        OutputDirectory(finished, JOB)


def test_full_disk_at_the_last_rename(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = OutputDirectory(tmp_path / "out", JOB)

    def full(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", full)
    with output.open(), pytest.raises(MsQuantError, match="out: no space left on device"):
        output.finish([write_bytes(output.partial / "a", b"")], source, {})
    assert not (tmp_path / "out").exists()


def test_changed_files_are_named(finished: Path) -> None:
    path = finished / "rank_0" / "b.bin"
    path.write_bytes(b"Inner")
    assert check_files(finished) == [f"{path}: sha256 differs from {RECORD}, the file was changed"]
    path.write_bytes(b"inne")
    assert check_files(finished) == [f"{path}: 4 bytes, expected 5"]
    path.unlink()
    assert check_files(finished) == [f"{path}: no such file, expected as {RECORD} lists it"]


def test_a_changed_byte_of_the_record_is_seen(finished: Path) -> None:
    path = finished / RECORD
    for old, new in ((b"W8A8", b"W8A9"), (b'"files"', b'"filez"'), (b"\n  ", b"\n\t ")):
        content = path.read_bytes()
        path.write_bytes(content.replace(old, new, 1))
        assert check_files(finished)[0] == (
            f"{path}: differs from its own sha256, the file was changed"
        )
        path.write_bytes(content)
    assert check_files(finished) == []


def test_records_that_lie(finished: Path) -> None:
    rewrite(finished, files={"../source/LICENSE": {"bytes": 5, "sha256": ""}})
    assert "lists '../source/LICENSE', expected a file in the directory" in check_files(finished)[0]
    rewrite(finished, files={"z.bin": [4]})
    assert "'z.bin' is [4], expected bytes and sha256" in check_files(finished)[0]
    rewrite(finished, files=None)
    assert check_files(finished) == [f"{finished / RECORD}: lists no files"]
    (finished / RECORD).unlink()
    with pytest.raises(MsQuantError, match="no such file"):
        check_files(finished)
