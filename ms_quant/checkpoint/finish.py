"""The output directory: it appears under its name when every file in it is whole.

Files are gathered in ``OUTPUT.partial`` and the directory is renamed at the end. The file
``ms_quant.json`` in it says what was computed and the size and sha256 of every other file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ms_quant.checkpoint.atomic import (
    FileRecord,
    disk_errors,
    sha256_file,
    sync_directory,
    write_bytes,
    write_json,
)
from ms_quant.checkpoint.job import find_difference, remove_temporaries
from ms_quant.errors import MsQuantError
from ms_quant.models.config import read_json

RECORD = "ms_quant.json"
COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)


class OutputDirectory:
    """An output that is finished, begun or new.

    Args:
        path: the final directory.
        record: what it shall hold; a finished output with another record is refused.

    Raises:
        MsQuantError: the directory exists with other content.
    """

    def __init__(self, path: Path, record: Mapping[str, Any]):
        self.path, self.record = path, json.loads(json.dumps(record))
        self.partial = path.with_name(path.name + ".partial")
        self.finished = False
        if path.exists():
            self._check()

    def _check(self) -> None:
        if not self.path.is_dir():
            raise MsQuantError(f"{self.path}: exists and is a file, expected a directory to make")
        if not any(self.path.iterdir()):
            return
        if not (self.path / RECORD).exists():
            raise MsQuantError(
                f"{self.path}: exists with other content, expected a new or empty directory"
            )
        found = find_difference(read_json(self.path / RECORD).get("record"), self.record)
        if found:
            key, before, after = found
            raise MsQuantError(
                f"{self.path}: exists and was made with {key} = {before!r}, now {key} is "
                f"{after!r}; expected a new or empty directory"
            )
        self.finished = True

    def begin(self) -> Path:
        """The directory to write into; whole files of an interrupted run of the same job stay."""
        with disk_errors(self.partial, "the output directory"):
            mark = self.partial / RECORD
            if self.partial.exists() and (
                not mark.exists() or read_json(mark).get("record") != self.record
            ):
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True, exist_ok=True)
            remove_temporaries(self.partial)
            if not mark.exists():
                write_json(mark, {"record": self.record})
        return self.partial

    def finish(self, files: Sequence[FileRecord], source: Path, facts: Mapping[str, Any]) -> None:
        """Copies the tokenizer, writes the record and gives the directory its name."""
        copied = [
            write_bytes(self.partial / name, (source / name).read_bytes())
            for name in COPIED
            if (source / name).is_file()
        ]
        listed = {
            file.name: {"bytes": file.bytes, "sha256": file.sha256}
            for file in sorted([*files, *copied], key=lambda file: file.name)
        }
        write_json(self.partial / RECORD, {"record": self.record, **facts, "files": listed})
        with disk_errors(self.path, "the output directory"):
            sync_directory(self.partial)
            self.partial.rename(self.path)
            sync_directory(self.path.parent)


def check_files(directory: Path) -> list[str]:
    """What differs from the record: missing, changed and unlisted files, one line each."""
    listed = read_json(directory / RECORD).get("files")
    if not isinstance(listed, dict):
        return [f"{directory / RECORD}: lists no files"]
    problems = []
    for name, expected in listed.items():
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()) or not path.is_file():
            problems.append(f"{path}: no such file, expected as {RECORD} lists it")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, expected {expected['bytes']}")
        elif sha256_file(path) != expected["sha256"]:
            problems.append(f"{path}: sha256 differs from {RECORD}, the file was changed")
    return problems
