"""One process at a time in a directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ms_quant.errors import JobConflictError
from ms_quant.files.atomic import disk_errors

try:
    import fcntl
except ImportError:  # a system without flock works without the lock
    fcntl = None  # type: ignore[assignment]


class BusyError(JobConflictError):
    """Another process works there, and goes on."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file or a directory. The system releases it on death.

    Args:
        path (Path): what to lock; made as an empty file when it does not exist.

    Raises:
        MsQuantError: another process holds it (a :class:`BusyError`), or it cannot be opened.
    """
    if fcntl is None:
        yield
        return
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    with disk_errors(path, "the lock"):
        descriptor = os.open(path, flags, 0o666)
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
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:  # a file system without locks
        return True
