"""Whole files or none, full disks, and directories put in the place of others."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ms_quant.checkpoint import atomic
from ms_quant.errors import MsQuantError


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file_and_the_tensor() -> None:
    with Path("/dev/full").open("wb", buffering=0) as file:
        sink = atomic.Sink(Path("x.safetensors"), file)
        with pytest.raises(
            MsQuantError, match=r"x\.safetensors: no space left on device while writing tensor 'a'"
        ):
            sink.write(b"data", "tensor 'a'")


def test_write_json_keeps_the_order(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "x.json", {"b": "é", "a": 1})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "b": "é",\n  "a": 1\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(tmp_path / "x.json", float("nan"))


def test_replace_directory(tmp_path: Path) -> None:
    for number in (1, 2):
        new = tmp_path / "new"
        new.mkdir()
        (new / f"{number}.txt").write_text("")
        atomic.replace_directory(new, tmp_path / "final")
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert [p.name for p in (tmp_path / "final").iterdir()] == ["2.txt"]


def test_replace_directory_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, final = tmp_path / "new", tmp_path / "final"
    new.mkdir()
    final.mkdir()
    (final / "old.txt").write_text("")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self == new:
            raise OSError(errno.EXDEV, "other file system")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(MsQuantError, match="other file system"):
        atomic.replace_directory(new, final)
    assert (final / "old.txt").exists()


def test_free_space_check(tmp_path: Path) -> None:
    atomic.free_space_check(tmp_path / "not" / "yet", 1)
    with pytest.raises(MsQuantError, match=rf"bytes are free, expected at least {1 << 60}"):
        atomic.free_space_check(tmp_path, 1 << 60)
