"""The output directory: it appears under its name when every file in it is whole.

Files are gathered in ``OUTPUT.partial`` and the directory is renamed at the end. The file
``ms_quant.json`` in it says what was computed and the size and sha256 of every other file, and
ends with a sha256 of its own content.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ms_quant.errors import DiskError, JobConflictError, MsQuantError
from ms_quant.files.atomic import (
    FileRecord,
    disk_errors,
    json_text,
    sha256_file,
    sync_directory,
    write_bytes,
    write_json,
)
from ms_quant.files.companion_files import companion_bytes
from ms_quant.files.lock import locked
from ms_quant.files.own import make_inside, require_own_directory, require_own_file
from ms_quant.files.placed_file import ENDING
from ms_quant.files.sealed import seal
from ms_quant.files.strict_json import read_json
from ms_quant.job.directory import explain_difference
from ms_quant.job.written import WRITTEN, WrittenFiles

RECORD = "ms_quant.json"
MAX_RECORD_BYTES = 256 << 20
_LOG = logging.getLogger(__name__)

_MADE = "|".join(
    [
        *map(re.escape, (RECORD, "config.json")),
        r"(quant-)?model-\d{5,}-of-\d{5,}\.safetensors",
        r"model-rank-\d+-part-0\.safetensors",
        r"model\.safetensors\.index\.json",
        r"quant\w*_description\w*\.json",
        r"quant_model_weight\w*(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?",
        r"block-\d{5,}\.proof",
        r"tensor-\d{5,}\.safetensors",
    ]
)
_DIRECTORY = re.compile(r"rank_\d+|proof|tensors|optional")
_BEGINNING = re.compile(rf"\.{re.escape(RECORD)}\.\d+\.tmp")


class OutputDirectory:
    """An output that is finished, begun or new. Nothing is written before :meth:`open`.

    Args:
        path: the final directory.
        record: what it shall hold; a finished output with another record is refused.
        any_environment: a finished output may come from other versions, CPU or thread count.
        copied: paths of files that are copied from the source where it has them, at most one
            directory deep.
        made: paths of further files that are made in it, directories deep.

    Raises:
        MsQuantError: the directory exists with other content, is a symbolic link, or has no name
            of its own; or a file of the finished output is missing or has another size.
    """

    def __init__(
        self,
        path: Path,
        record: Mapping[str, Any],
        any_environment: bool = False,
        copied: Sequence[str] = (),
        made: Sequence[str] = (),
    ):
        check_output_name(path)
        self.copied = copied
        further = [*copied, *made]
        names = "|".join([_MADE, *(re.escape(Path(name).name) for name in further)])
        directories = sorted({p.as_posix() for n in further for p in Path(n).parents} - {"."})
        self._directory = re.compile("|".join([_DIRECTORY.pattern, *map(re.escape, directories)]))
        inside = rf"(({self._directory.pattern})/)?"
        self._temporary = re.compile(rf"{inside}\.\.?({names})({ENDING})?\.\d+\.tmp")
        # An interrupted run goes on with these.
        begun = rf"{re.escape(WRITTEN)}|{inside}\.({names}){ENDING}"
        self._ours = re.compile(rf"{inside}({names})|{begun}|{self._temporary.pattern}")
        self._proved = set[str]()  # what this run has written or read
        self.path, self.record = path, json.loads(json.dumps(record))
        self.partial = path.with_name(path.name + ".partial")
        self.finished = path.exists() and self._is_finished(any_environment)
        if not self.finished:
            for place in (path, self.partial):
                if place.is_symlink():
                    require_own_directory(place)
            self._check_partial()

    def _is_finished(self, any_environment: bool) -> bool:
        if not self.path.is_dir():
            raise JobConflictError(
                f"{self.path}: exists and is a file, expected a directory to make"
            )
        if not any(self.path.iterdir()):
            return False
        if not (self.path / RECORD).exists():
            raise JobConflictError(
                f"{self.path}: exists with other content, expected a new or empty directory"
            )
        value = read_json(self.path / RECORD, MAX_RECORD_BYTES)
        before = value.get("record")
        before = before if isinstance(before, dict) else {}
        found = explain_difference(before, self.record, "made", any_environment)
        if found:
            hint = "expected a new or empty directory"
            if found[0].startswith("environment"):
                hint = "use --any-environment to take it as it is"
            raise JobConflictError(f"{self.path}: exists and {found[1]}; {hint}")
        problem = next(_listed_problems(self.path, value, _size_problem), None)
        if problem:
            raise JobConflictError(f"{problem}; delete {self.path} to make it again")
        return True

    def _check_partial(self) -> None:
        """Refuses a partial directory that is not one of this class, or empty."""
        if not self.partial.exists():
            return
        foreign = not self.partial.is_dir()
        for path in () if foreign else self._entries():
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                require_own_file(path)
        if not foreign and self._mark() is None:
            foreign = not all(
                path.is_file() and _BEGINNING.fullmatch(path.name)
                for path in self.partial.iterdir()
            )
        elif not foreign and not self._is_begun():
            mark = self._mark() or {}
            # A whole output under this name: a user may have put it there.
            foreign = "files" in mark or any(
                not self._ours.fullmatch(path.relative_to(self.partial).as_posix())
                for path in self._entries()
                if not (path.is_dir() and self._is_ours(path))
            )
        if foreign:
            raise JobConflictError(
                f"{self.partial}: exists with other content, expected to make it for the output"
            )

    def _entries(self) -> Iterator[Path]:
        """All that is in the partial directory; no link is followed."""
        for place, directories, files in os.walk(self.partial):
            yield from (Path(place, name) for name in (*directories, *files))

    def _is_ours(self, directory: Path) -> bool:
        return bool(self._directory.fullmatch(directory.relative_to(self.partial).as_posix()))

    def _mark(self) -> dict[str, Any] | None:
        """The record in the partial directory, if there is one."""
        path = self.partial / RECORD
        return read_json(path, MAX_RECORD_BYTES) if path.exists() else None

    def _is_begun(self) -> bool:
        """Whether the partial directory is of this very job."""
        return (self._mark() or {}).get("record") == self.record

    def bytes_present(self) -> int:
        """How much of the output an interrupted run has left."""
        if not self._is_begun():
            return 0
        return sum(path.stat().st_size for path in self._files(self._ours))

    @contextmanager
    def open(self) -> Iterator[None]:
        """Makes the directory to write into; whole files of an interrupted run stay in it.

        Until the end no other process can open it.

        Raises:
            MsQuantError: another process writes this output, or the disk does not take it.
        """
        with disk_errors(self.partial, "the output directory"):
            self.partial.mkdir(parents=True, exist_ok=True)
        with locked(self.partial):
            self._check_partial()
            with disk_errors(self.partial, "the output directory"):
                if self._mark() is not None and not self._is_begun():
                    self._clear()
                for path in self._files(self._temporary):
                    path.unlink()
            if self._mark() is None:
                write_json(self.partial / RECORD, {"record": self.record})
            self._written = WrittenFiles(self.partial)
            yield

    def _files(self, names: re.Pattern[str]) -> list[Path]:
        return [
            path
            for path in sorted(self._entries())
            if names.fullmatch(path.relative_to(self.partial).as_posix()) and path.is_file()
        ]

    def _clear(self) -> None:
        """Deletes another job's files; the mark goes last, so a kill in between leaves it ours."""
        mark = self.partial / RECORD
        for path in self._files(self._ours):
            if path != mark:
                path.unlink()
        for path in sorted(self._entries(), reverse=True):  # what is inside goes first
            if path.is_dir():
                path.rmdir()
        mark.unlink()

    def write_once(self, name: str, write: Callable[[Path], FileRecord]) -> FileRecord:
        """Writes a file, unless an interrupted run of the same job has finished it.

        Args:
            name: its path in the output, with ``/``.
            write: writes a file atomically.
        """
        return self.begin_once(name, lambda path: partial(write, path))()

    def begin_once(
        self, name: str, begin: Callable[[Path], Callable[[], FileRecord]]
    ) -> Callable[[], FileRecord]:
        """As :meth:`write_once`, where a file is whole when what ``begin`` gives has ended."""
        path, record = self.partial / name, self.written(name)
        if record is not None:
            return lambda: record
        end = begin(path)

        def ended() -> FileRecord:
            return self.note(path, end())

        return ended

    def written(self, name: str) -> FileRecord | None:
        """What an interrupted run of the same job has finished and is as it was, else None.

        Args:
            name: the path of a file in the output, with ``/``; its directory is made.

        Raises:
            MsQuantError: a link or something else that is no file stands under its name.
        """
        path = self.partial / name
        with disk_errors(path, "its directory"):
            make_inside(self.partial, name)
        require_own_file(path)
        if not path.exists():
            return None
        known = self._written[name]
        if known is not None and name in self._proved:
            return known
        if known is None:
            reason = "is of a run that was interrupted just then, or of an earlier version"
        elif path.stat().st_size == known.bytes and sha256_file(path) == known.sha256:
            self._proved.add(name)
            return known
        else:
            reason = "is damaged (it is not as it was written)"
        _LOG.warning("%s: %s; it is written again", path, reason)
        return None

    def note(self, path: Path, record: FileRecord) -> FileRecord:
        """Notes a file in the partial directory that has just been finished; once more is no harm.

        Raises:
            MsQuantError: its directory became a link meanwhile, or the disk does not take the note.
        """
        name = path.relative_to(self.partial).as_posix()
        make_inside(self.partial, name)
        require_own_file(path)
        record = replace(record, name=name)
        if self._written[name] != record or name not in self._proved:
            self._written.add(record)
            self._proved.add(name)
        return record

    def finish(self, files: Sequence[FileRecord], source: Path, facts: Mapping[str, Any]) -> None:
        """Copies the tokenizer, writes the record and gives the directory its name.

        Args:
            files: what was written; names are relative to the directory, with ``/``.
            source: the model whose tokenizer files are copied.
            facts: further entries of the record.
        """
        copied = [self._copy(source, name) for name in self.copied if (source / name).is_file()]
        listed = {
            file.name: {"bytes": file.bytes, "sha256": file.sha256}
            for file in sorted([*files, *copied], key=lambda file: file.name)
        }
        content = {"record": self.record, **facts, "files": listed}
        write_json(self.partial / RECORD, seal(content))
        with disk_errors(self.path, "the output directory"):
            (self.partial / WRITTEN).unlink(missing_ok=True)
            sync_directory(self.partial)
            self.partial.rename(self.path)
            sync_directory(self.path.parent)

    def _copy(self, source: Path, name: str) -> FileRecord:
        path = self.partial / name
        with disk_errors(path, "its directory"):
            path.parent.mkdir(exist_ok=True)
        return replace(write_bytes(path, companion_bytes(source / name)), name=name)

    @contextmanager
    def open_or_discard(self) -> Iterator[None]:
        """As :meth:`open`; what was begun goes when an error says that nothing will come of it.

        A full disk is no such error.
        """
        with self.open():
            try:
                yield
            except DiskError:
                raise
            except MsQuantError:
                with disk_errors(self.partial, "its end"):
                    self._clear()
                    self.partial.rmdir()
                raise


def check_output_name(path: Path) -> None:
    """Refuses an output such as ``.`` or ``/``, which has no name beside which to work."""
    if path.name in ("", ".."):
        raise JobConflictError(f"{path}: the output has no name, expected a directory to make")


def check_files(directory: Path, chosen: Callable[[str], bool] = lambda name: True) -> list[str]:
    """What differs from the record: missing and changed files, itself included, one line each.

    Args:
        directory: the checkpoint.
        chosen: whether a file, by its path in the directory, is looked at.

    Raises:
        MsQuantError: there is no record, or it is not JSON.
    """
    path = directory / RECORD
    value = read_json(path, MAX_RECORD_BYTES)
    content = {key: item for key, item in value.items() if key != "sha256"}
    problems = []
    if seal(content) != value or path.read_bytes() != json_text(value).encode():
        problems.append(f"{path}: differs from its own sha256, the file was changed")
    return [*problems, *_listed_problems(directory, value, _file_problem, chosen)]


def _listed_problems(
    directory: Path,
    value: Mapping[str, Any],
    check: Callable[[Path, str, Any], str | None],
    chosen: Callable[[str], bool] = lambda name: True,
) -> Iterator[str]:
    """What is wrong with the files that a record lists."""
    listed = value.get("files")
    if not isinstance(listed, dict):
        yield f"{directory / RECORD}: lists no files"
        return
    found = (check(directory, name, entry) for name, entry in listed.items() if chosen(name))
    yield from filter(None, found)


def _file_problem(directory: Path, name: str, expected: Any) -> str | None:
    path = directory / name
    problem = _size_problem(directory, name, expected)
    if problem is None and sha256_file(path) != expected["sha256"]:
        return f"{path}: sha256 differs from {RECORD}, the file was changed"
    return problem


def _size_problem(directory: Path, name: str, expected: Any) -> str | None:
    path = directory / name
    if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
        return f"{directory / RECORD}: {name!r} is {expected!r:.80}, expected bytes and sha256"
    if "\0" in name or not path.resolve().is_relative_to(directory.resolve()):
        return f"{directory / RECORD}: lists {name!r}, expected a file in the directory"
    if not path.is_file():
        return f"{path}: no such file, expected as {RECORD} lists it"
    if path.stat().st_size != expected["bytes"]:
        return f"{path}: {path.stat().st_size} bytes, expected {expected['bytes']}"
    return None
