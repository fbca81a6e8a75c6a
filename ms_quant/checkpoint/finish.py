"""The output directory: it appears under its name when every file in it is whole.

Files are gathered in ``OUTPUT.partial`` and the directory is renamed at the end. The file
``ms_quant.json`` in it says what was computed and the size and sha256 of every other file, and
ends with a sha256 of its own content.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ms_quant.checkpoint.atomic import (
    FileRecord,
    disk_errors,
    json_text,
    sha256_file,
    sync_directory,
    write_bytes,
    write_json,
)
from ms_quant.checkpoint.job import find_difference, is_temporary, remove_temporaries
from ms_quant.errors import MsQuantError
from ms_quant.models.config import read_json

RECORD = "ms_quant.json"
MAX_RECORD_BYTES = 256 << 20
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
        any_environment: a finished output may come from other versions, CPU or thread count.

    Raises:
        MsQuantError: the directory exists with other content, or has no name of its own.
    """

    def __init__(self, path: Path, record: Mapping[str, Any], any_environment: bool = False):
        if path.name in ("", ".."):
            raise MsQuantError(f"{path}: the output has no name, expected a directory to make")
        self.path, self.record = path, json.loads(json.dumps(record))
        self.partial = path.with_name(path.name + ".partial")
        self.finished = False
        if path.exists():
            self._check(any_environment)
        if not self.finished and self.partial.exists() and not self._is_ours():
            raise MsQuantError(
                f"{self.partial}: exists with other content, expected to make it for the output"
            )

    def _is_ours(self) -> bool:
        """Whether the partial directory is one of this class, or empty."""
        return (self.partial / RECORD).exists() or (
            self.partial.is_dir() and all(is_temporary(path) for path in self.partial.iterdir())
        )

    def _check(self, any_environment: bool) -> None:
        if not self.path.is_dir():
            raise MsQuantError(f"{self.path}: exists and is a file, expected a directory to make")
        if not any(self.path.iterdir()):
            return
        if not (self.path / RECORD).exists():
            raise MsQuantError(
                f"{self.path}: exists with other content, expected a new or empty directory"
            )
        before = read_json(self.path / RECORD, MAX_RECORD_BYTES).get("record")
        now = self.record
        if any_environment and isinstance(before, dict):
            before, now = {**before, "environment": None}, {**now, "environment": None}
        found = find_difference(before, now)
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
            if mark.exists() and read_json(mark, MAX_RECORD_BYTES).get("record") != self.record:
                self._clear()
            self.partial.mkdir(parents=True, exist_ok=True)
            remove_temporaries(self.partial)
            if not mark.exists():
                write_json(mark, {"record": self.record})
        return self.partial

    def _clear(self) -> None:
        """Deletes another job's files; the mark goes last, so a kill in between leaves it ours."""
        for path in sorted(self.partial.iterdir(), key=lambda path: path.name == RECORD):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def finish(self, files: Sequence[FileRecord], source: Path, facts: Mapping[str, Any]) -> None:
        """Copies the tokenizer, writes the record and gives the directory its name.

        Args:
            files: what was written; names are relative to the directory, with ``/``.
            source: the model whose tokenizer files are copied.
            facts: further entries of the record.
        """
        copied = [
            write_bytes(self.partial / name, (source / name).read_bytes())
            for name in COPIED
            if (source / name).is_file()
        ]
        listed = {
            file.name: {"bytes": file.bytes, "sha256": file.sha256}
            for file in sorted([*files, *copied], key=lambda file: file.name)
        }
        content = {"record": self.record, **facts, "files": listed}
        write_json(self.partial / RECORD, seal(content))
        with disk_errors(self.path, "the output directory"):
            sync_directory(self.partial)
            self.partial.rename(self.path)
            sync_directory(self.path.parent)


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a record with a digest of itself: a changed byte in it is seen, too."""
    text = json.dumps(content, sort_keys=True)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def check_files(directory: Path) -> list[str]:
    """What differs from the record: missing and changed files, itself included, one line each.

    Raises:
        MsQuantError: there is no record, or it is not JSON.
    """
    path = directory / RECORD
    value = read_json(path, MAX_RECORD_BYTES)
    content = {key: item for key, item in value.items() if key != "sha256"}
    problems = []
    if seal(content) != value or path.read_bytes() != json_text(value).encode():
        problems.append(f"{path}: differs from its own sha256, the file was changed")
    listed = value.get("files")
    if not isinstance(listed, dict):
        return [*problems, f"{path}: lists no files"]
    return problems + [
        problem
        for name, expected in listed.items()
        if (problem := _file_problem(directory, name, expected))
    ]


def _file_problem(directory: Path, name: str, expected: Any) -> str | None:
    path = directory / name
    if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
        return f"{directory / RECORD}: {name!r} is {expected!r:.80}, expected bytes and sha256"
    if "\0" in name or not path.resolve().is_relative_to(directory.resolve()):
        return f"{directory / RECORD}: lists {name!r}, expected a file in the directory"
    if not path.is_file():
        return f"{path}: no such file, expected as {RECORD} lists it"
    if path.stat().st_size != expected["bytes"]:
        return f"{path}: {path.stat().st_size} bytes, expected {expected['bytes']}"
    if sha256_file(path) != expected["sha256"]:
        return f"{path}: sha256 differs from {RECORD}, the file was changed"
    return None


def unlisted_files(directory: Path) -> list[str]:
    """Files, in subdirectories too, that the record does not list, one line each.

    Raises:
        MsQuantError: there is no record, or it is not JSON.
    """
    listed = read_json(directory / RECORD, MAX_RECORD_BYTES).get("files")
    names = set(listed) if isinstance(listed, dict) else set()
    return [
        f"{path}: not listed in {RECORD}, expected no other file"
        for path in sorted(directory.rglob("*"))
        if not path.is_dir() and path.relative_to(directory).as_posix() not in {*names, RECORD}
    ]
