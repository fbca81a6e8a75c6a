"""One process at a time in a directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ms_quant.errors import JobConflictError
from ms_quant.files.atomic import disk_errors
from ms_quant.files.own import open_directory, open_own

try:
    import fcntl
except ImportError:  # a system without flock works without the lock
    fcntl = None  # type: ignore[assignment]


_NEW_OR_OLD = os.O_RDWR | os.O_CREAT


class BusyError(JobConflictError):
    """Another process works there, and goes on."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file or a directory. The system releases it on death.

    Args:
        path (Path): what to lock; made as an empty file when it does not exist.

    Raises:
        MsQuantError: another process holds it (a :class:`BusyError`), it cannot be opened,
            or it is a symbolic link or no file.
    """
    if fcntl is None:
        yield
        return
    with disk_errors(path, "the lock"):
        descriptor = open_directory(path) if path.is_dir() else open_own(path, _NEW_OR_OLD)
    try:
        if not _lock(descriptor, path):
            raise BusyError(
                f"{path}: another process works on this job, expected to be the only one"
            )
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Whether the lock is ours, and still on what has the name."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:  # a file system without locks
        return True
