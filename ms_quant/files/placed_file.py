"""A safetensors file whose tensors are written in any order, each to its place, over several runs.

The file grows under the name ``.NAME.placed``; ``.NAME.placed.json`` says which tensors are in it
and on the disk, with the CRC-32 of each (see :mod:`~ms_quant.files.checked_file`). A kill loses
those that were put after the last :meth:`PlacedFile.save`, and one that has changed since.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from ms_quant.files.atomic import (
    ANY_MODE,
    CHUNK_BYTES,
    FileRecord,
    disk_errors,
    sha256_file,
    sync_directory,
)
from ms_quant.files.own import open_own, require_own_file
from ms_quant.files.sealed import read_sealed, write_sealed
from ms_quant.files.writer import Array, TensorPlan, checked_pieces, file_layout

MAX_STATE_BYTES = 64 << 20
_LOG = logging.getLogger(__name__)
ENDING = r"\.placed(\.json)?"
"""What a pattern for the names of such files adds to ``.NAME``."""


class PlacedFile:
    """The file, new or begun.

    Args:
        path: its name when it is whole.
        plans: its tensors.
        mode: the widest permissions that it gets.
        metadata: the ``__metadata__`` of its header.

    Raises:
        MsQuantError: the disk does not take it.
    """

    def __init__(
        self,
        path: Path,
        plans: Sequence[TensorPlan],
        mode: int = ANY_MODE,
        metadata: Mapping[str, str] | None = None,
    ):
        self.path, self.mode = path, mode
        self._temporary = path.with_name(f".{path.name}.placed")
        self._state = path.with_name(f".{path.name}.placed.json")
        header, layout = file_layout(plans, path, metadata)
        self._start, offset = dict[str, int](), len(header)
        self._bytes = {plan.name: plan.bytes for plan in layout}
        for plan in layout:
            self._start[plan.name] = offset
            offset += plan.bytes
        self._header = hashlib.sha256(header).hexdigest()
        self._sums, self._unsaved, self._lock = dict[str, int](), False, Lock()
        for place in (self._temporary, self._state):
            require_own_file(place)
        with disk_errors(path):
            state = read_sealed(self._state, MAX_STATE_BYTES)
            begun = self._is_begun(offset, state)
            flags = os.O_RDWR | (0 if begun else os.O_CREAT | os.O_TRUNC)
            self._file = open_own(self._temporary, flags, mode)
            os.ftruncate(self._file, offset)
            _write(self._file, memoryview(header), 0)
        if begun and state is not None:
            self._take_over(state["sums"])

    def _is_begun(self, size: int, state: Mapping[str, Any] | None) -> bool:
        """Whether another run has begun the same file."""
        there = self._temporary.exists() and self._temporary.stat().st_size == size
        return there and state is not None and state.get("header") == self._header

    def _take_over(self, sums: Mapping[str, int]) -> None:
        """Takes what another run has put, and is as it was."""
        for name, expected in sums.items():
            if self._sum(name) == expected:
                self._sums[name] = expected
            else:
                _LOG.warning("%s: tensor %r is damaged; it is made again", self._temporary, name)

    def _sum(self, name: str) -> int:
        found, offset, left = 0, self._start[name], self._bytes[name]
        with disk_errors(self.path, f"tensor {name!r}"):
            while left and (piece := os.pread(self._file, min(left, CHUNK_BYTES), offset)):
                found, offset, left = (
                    zlib.crc32(piece, found),
                    offset + len(piece),
                    left - len(piece),
                )
        return found

    @property
    def done(self) -> Collection[str]:
        """Names of the tensors that are in it."""
        return self._sums.keys()

    @property
    def left(self) -> set[str]:
        """Names of the tensors that are not in it."""
        return self._start.keys() - self._sums.keys()

    def put(self, plan: TensorPlan, value: Array) -> None:
        """Writes a tensor, whole or in pieces along its rows.

        Raises:
            MsQuantError: it is not as planned, or the disk is full.
        """
        offset, found = self._start[plan.name], 0
        for piece in checked_pieces(value, plan, self.path):
            with disk_errors(self.path, f"tensor {plan.name!r}"):
                _write(self._file, piece, offset)
            offset, found = offset + len(piece), zlib.crc32(piece, found)
        with self._lock:
            self._sums[plan.name] = found
            self._unsaved = True

    def save(self) -> None:
        """What was put is on the disk, and stays in it. Another thread may put more meanwhile."""
        with self._lock:
            if not self._unsaved:
                return
            sums, self._unsaved = dict(sorted(self._sums.items())), False
        with disk_errors(self.path):
            os.fsync(self._file)
        write_sealed(self._state, {"header": self._header, "sums": sums})

    def close(self) -> None:
        """Lets go of the file, whole or not."""
        os.close(self._file)

    def finish(self) -> FileRecord:
        """Gives the file its name; all tensors are in it. It is hashed while the disk takes it."""
        assert not self.left, self.left
        try:
            with ThreadPoolExecutor(1) as hashing:
                digest = hashing.submit(sha256_file, self._temporary)
                self.save()
        finally:
            self.close()
        with disk_errors(self.path):
            self._temporary.replace(self.path)
            sync_directory(self.path.parent)
            self._state.unlink(missing_ok=True)
        return FileRecord(self.path.name, self.path.stat().st_size, digest.result())


def _write(file: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count
