"""Files and directories of our own making: none of them is reached through a symbolic link.

What a user names may be a link, and so may all that leads there. In the directories that are made
for an output or a job nobody else has anything to do: a link, a pipe or a device that stands there
under a name of ours would have us write elsewhere, or wait for ever.
"""

from __future__ import annotations

import errno
import os
import stat
from io import RawIOBase
from pathlib import Path

from ms_quant.errors import BadFileError, JobConflictError

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # for who writes to a pipe
_BINARY = getattr(os, "O_BINARY", 0)
ANY_MODE = 0o666
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)


def _kind(path: Path) -> str | None:
    """What is there under a name, links not followed; None where nothing is."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    return next((name for is_one, name in _KINDS if is_one(mode)), "a file")


def is_own_file(path: Path) -> bool:
    """Whether a regular file is there, and not merely a link to one."""
    return _kind(path) == "a file"


def require_own_file(path: Path) -> None:
    """Refuses what is there under the name of a file of ours and is none; nothing may be there.

    Raises:
        MsQuantError: names what it is.
    """
    found = _kind(path)
    if found not in (None, "a file"):
        raise JobConflictError(f"{path}: is {found}, expected a file of this job; delete it")


def require_own_directory(path: Path) -> None:
    """Refuses what is there under the name of a directory of ours and is none.

    Raises:
        MsQuantError: names what it is.
    """
    found = _kind(path)
    if found == "a symbolic link":
        raise JobConflictError(f"{path}: is a symbolic link, expected a directory to make")
    if found not in (None, "a directory"):
        raise JobConflictError(f"{path}: exists and is {found[2:]}, expected a directory to make")


def make_inside(directory: Path, inside: str) -> None:
    """Makes the directories that lead to a file in a directory of ours.

    Args:
        directory: ours, which is there.
        inside: the path of the file in it, with ``/``.

    Raises:
        MsQuantError: one of them is a link or a file.
        OSError: the disk does not take one.
    """
    for part in Path(inside).parts[:-1]:
        directory = directory / part
        require_own_directory(directory)
        directory.mkdir(exist_ok=True)


def open_directory(path: Path) -> int:
    """A descriptor of a directory that is no link.

    Raises:
        MsQuantError: it is a link, or no directory.
        OSError: it cannot be opened.
    """
    require_own_directory(path)
    return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _NO_FOLLOW)


def open_new(path: Path, mode: int = ANY_MODE) -> RawIOBase:
    """A new file to write to, unbuffered; nothing that has its name is opened.

    Raises:
        OSError: it cannot be made.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _BINARY, mode)
    return os.fdopen(descriptor, "wb", buffering=0)


def open_own(path: Path, flags: int, mode: int = ANY_MODE) -> int:
    """A descriptor of a regular file that is no link; a pipe or a device is not waited for.

    Args:
        path: the file.
        flags: of :func:`os.open`.
        mode: of a new file.

    Raises:
        MsQuantError: it is a link, or no regular file.
        OSError: it cannot be opened.
    """
    flags |= _NO_FOLLOW | _NO_WAIT | _BINARY
    try:
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            require_own_file(path)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        require_own_file(path)
        raise BadFileError(f"{path}: is no regular file, expected one of this job; delete it")
    return descriptor
