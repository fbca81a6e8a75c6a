"""Files that are either whole or absent: written aside, fsynced, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

from ms_quant.errors import BadFileError, DiskError
from ms_quant.files.own import ANY_MODE, open_new

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """What was written.

    Attributes:
        name: the file name; in the list of an output, its path relative to the output.
        bytes: the file's size.
        sha256: hexadecimal digest of the whole file.
    """

    name: str
    bytes: int
    sha256: str


@contextmanager
def disk_errors(path: Path, what: str = "the file") -> Iterator[None]:
    """Turns the ``OSError`` of a write into one sentence.

    Args:
        path (Path): the file being written.
        what (str): the part being written, for the message.

    Raises:
        DiskError: the disk is full, or the write failed in another way.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            reason = f"no space left on device while writing {what}"
        else:
            reason = f"writing {what} failed ({error.strerror or error})"
        raise DiskError(f"{path}: {reason}") from error


class Sink:
    """The open temporary file of :func:`atomic_file`; counts and hashes what passes.

    The file is unbuffered: with a buffer, a full disk would show again when it is closed.
    """

    def __init__(self, path: Path, file: RawIOBase) -> None:
        self.path = path
        self.bytes = 0
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview, what: str = "the file") -> None:
        """Appends ``data``; ``what`` names it should the disk be full."""
        rest = memoryview(data)
        with disk_errors(self.path, what):
            while len(rest):
                rest = rest[self._file.write(rest) :]
        self._hash.update(data)
        self.bytes += len(data)

    def record(self) -> FileRecord:
        """Name, size and digest of what was written so far."""
        return FileRecord(self.path.name, self.bytes, self._hash.hexdigest())


@contextmanager
def atomic_file(path: Path | str, mode: int = ANY_MODE) -> Iterator[Sink]:
    """Opens a file that appears under its name only when it is complete and on the disk.

    The temporary name is ``.NAME.PID.tmp`` in the same directory: two processes never share
    one. On any exception the temporary file is removed and the old file, if any, is kept.

    Args:
        path (Path | str): the final name.
        mode (int): the widest permissions that the file gets, of which the process's umask takes
            what it takes of any file.

    Returns:
        A context manager that gives the :class:`Sink` to write to.

    Raises:
        MsQuantError: the disk is full, or the directory cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path):
            temporary.unlink(missing_ok=True)  # of a process that was killed, in another mode
            file = open_new(temporary, mode)
        with file:
            yield Sink(path, file)
            with disk_errors(path):
                os.fsync(file.fileno())
        with disk_errors(path):
            temporary.replace(path)
            sync_directory(path.parent)
    finally:
        # After the rename there is nothing left under the temporary name.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Makes renames in a directory durable, where the system can open directories."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path | str, data: bytes, mode: int = ANY_MODE) -> FileRecord:
    """Writes a whole file atomically.

    Args:
        path (Path | str): the final name.
        data (bytes): the content.
        mode (int): as for :func:`atomic_file`.

    Returns:
        FileRecord, name, size and digest.

    Raises:
        MsQuantError: the disk is full, or the directory cannot be written.
    """
    with atomic_file(path, mode) as sink:
        sink.write(data)
    return sink.record()


def write_json(path: Path | str, value: Any, mode: int = ANY_MODE) -> FileRecord:
    """Writes JSON atomically: keys in the given order, indent 2, a newline at the end.

    Args:
        path (Path | str): the final name.
        value (Any): what to write; NaN and infinity are not JSON and are refused.
        mode (int): as for :func:`atomic_file`.

    Returns:
        FileRecord, name, size and digest.

    Raises:
        MsQuantError: the disk is full, or the directory cannot be written.
        ValueError: `value` holds NaN or infinity.
    """
    return write_bytes(path, json_text(value).encode(), mode)


def json_text(value: Any) -> str:
    """The text that :func:`write_json` writes.

    Raises:
        ValueError: `value` holds NaN or infinity.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def sha256_file(path: Path | str) -> str:
    """The hexadecimal SHA-256 of a file, read in pieces.

    Args:
        path (Path | str): the file.

    Returns:
        str, 64 hexadecimal digits.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with Path(path).open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def free_space_check(directory: Path | str, needed_bytes: int) -> None:
    """Refuses to start what will not fit.

    Args:
        directory (Path | str): where files will be written; it need not exist yet.
        needed_bytes (int): how much will be written.

    Raises:
        MsQuantError: the directory cannot be made, or its file system has less free space.
    """
    free_spaces_check({Path(directory): needed_bytes})


def free_spaces_check(needed: Mapping[Path, int]) -> None:
    """Refuses to start what will not fit in several directories, maybe of one file system.

    Args:
        needed (Mapping[Path, int]): directory, which need not exist yet, to how many bytes will
            be written there.

    Raises:
        MsQuantError: a directory cannot be made, or its file system has less free space than all
            directories on it need.
    """
    devices: dict[int, tuple[Path, Path, int]] = {}
    for directory, count in needed.items():
        place = _existing(directory)
        device = place.stat().st_dev
        first, _, others = devices.get(device, (directory, place, 0))
        devices[device] = first, place, others + count
    for directory, place, count in devices.values():
        available = shutil.disk_usage(place).free
        if available < count:
            raise BadFileError(
                f"{directory}: {available} bytes are free, expected at least {count}"
            )


def _existing(directory: Path) -> Path:
    """The directory, or the nearest one above it that exists, if files can be made there."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise BadFileError(f"{directory}: cannot be made, {place} is not a directory")
    if not os.access(place, os.W_OK | os.X_OK) or not shutil.disk_usage(place).total:
        raise BadFileError(f"{directory}: cannot be made, {place} cannot be written")
    return place
