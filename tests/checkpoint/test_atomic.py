"""Whole files or none, full disks, and space that is counted before the work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.files import atomic


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


def test_free_space_check(tmp_path: Path) -> None:
    atomic.free_space_check(tmp_path / "not" / "yet", 1)
    with pytest.raises(MsQuantError, match=rf"bytes are free, expected at least {1 << 60}"):
        atomic.free_space_check(tmp_path, 1 << 60)


def test_directories_on_one_file_system_share_its_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=1000, free=100)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage)
    both = {tmp_path / "a": 60, tmp_path / "b": 50}
    with pytest.raises(MsQuantError, match="a: 100 bytes are free, expected at least 110"):
        atomic.free_spaces_check(both)
    devices = {"a": 1, "b": 2}
    stat = Path.stat

    def apart(path: Path, **options: Any) -> Any:
        return SimpleNamespace(st_dev=devices[path.name], st_mode=stat(path).st_mode)

    for name in devices:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(Path, "stat", apart)
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    atomic.free_spaces_check(both)
    with pytest.raises(MsQuantError, match="b: 100 bytes are free, expected at least 101"):
        atomic.free_spaces_check({tmp_path / "a": 60, tmp_path / "b": 101})


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MsQuantError, match=r"out: cannot be made, .*file is not a directory"):
        atomic.free_space_check(tmp_path / "file" / "out", 1)
    if Path("/proc/self").exists():
        with pytest.raises(MsQuantError, match=r"/proc/x/o: cannot be made, /proc cannot be writ"):
            atomic.free_space_check("/proc/x/o", 1)
