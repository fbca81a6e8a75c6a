"""What a command has on the disk at each moment at which a kill may leave it, and damage to it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def moments(directory: Path, act: Callable[[], Any], kept: Path) -> list[Path]:
    """Copies of a directory before each rename that a command does, and before its last deletions.

    Args:
        directory: where the command works, and nothing else is.
        act: the command.
        kept: gets the copies.
    """
    replace, rename, found = Path.replace, Path.rename, list[Path]()

    def keep() -> None:
        place = kept / f"{len(found):04d}"
        shutil.copytree(directory, place, symlinks=True)
        found.append(place)

    def kept_first(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(path: Path, target: Path) -> Any:
            keep()
            return original(path, target)

        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", kept_first(replace))
        patch.setattr(Path, "rename", kept_first(rename))
        act()
    return found


def put_back(moment: Path, directory: Path) -> None:
    """Makes a directory as it was at a moment."""
    if directory.exists():
        shutil.rmtree(directory)
    shutil.copytree(moment, directory, symlinks=True)


def work_files(directory: Path) -> list[Path]:
    """What is there of a job and of an output in progress, but for what is half written."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return [path for path in found if not path.name.endswith((".tmp", ".lock"))]


def flip(path: Path, bit: int) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def mutate(path: Path, rng: random.Random) -> str:
    """Damages a file in one of many ways, and says how."""
    data = bytearray(path.read_bytes())
    size = max(1, len(data))
    at, count = rng.randrange(size), min(rng.choice([1, 4, 64, 4096]), size)
    ways: dict[str, Callable[[], bytes]] = {
        "a flipped bit": lambda: _flipped(data, at, rng),
        "cut off": lambda: bytes(data[:at]),
        "longer": lambda: bytes(data) + rng.randbytes(count),
        "zeros": lambda: bytes(data[:at] + bytes(count) + data[at + count :]),
        "random bytes": lambda: bytes(data[:at] + rng.randbytes(count) + data[at + count :]),
        "a hole": lambda: bytes(data[:at] + data[at + count :]),
        "twice": lambda: bytes(data[:at] + data[at : at + count] + data[at:]),
        "empty": lambda: b"",
    }
    kinds: dict[str, Callable[[], None]] = {
        "a link": lambda: path.symlink_to("/etc/hostname"),
        "a link to nothing": lambda: path.symlink_to("/nowhere/at/all"),
        "a pipe": lambda: os.mkfifo(path),
        "a directory": lambda: path.mkdir(),
        "a device": lambda: path.symlink_to("/dev/zero"),
    }
    way = rng.choice([*ways, *ways, *kinds])
    if way in ways:
        path.write_bytes(ways[way]())
    else:
        path.unlink()
        kinds[way]()
    return way


def _flipped(data: bytearray, at: int, rng: random.Random) -> bytes:
    if data:
        data[at % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data)


class TooLate(BaseException):
    """Something took longer than it may."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Fails what takes longer."""
    import signal

    def late(*_: object) -> None:
        raise TooLate(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
