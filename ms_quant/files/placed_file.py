"""A safetensors file whose tensors are written in any order, each to its place, over several runs.

The file grows under the name ``.NAME.placed``; ``.NAME.placed.json`` says which tensors are in it
and on the disk. A kill loses those that were put after the last :meth:`PlacedFile.save`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from ms_quant.files.atomic import (
    ANY_MODE,
    FileRecord,
    disk_errors,
    sha256_file,
    sync_directory,
    write_bytes,
)
from ms_quant.files.strict_json import read_json
from ms_quant.files.writer import Array, TensorPlan, checked_pieces, file_layout

MAX_STATE_BYTES = 64 << 20
ENDING = r"\.placed(\.json)?"
"""What a pattern for the names of such files adds to ``.NAME``."""


class PlacedFile:
    """The file, new or begun.

    Args:
        path: its name when it is whole.
        plans: its tensors.
        mode: the widest permissions that it gets.
        metadata: the ``__metadata__`` of its header.

    Attributes:
        done: names of the tensors that are in it.

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
        for plan in layout:
            self._start[plan.name] = offset
            offset += plan.bytes
        self._header = hashlib.sha256(header).hexdigest()
        self.done, self._unsaved, self._lock = set[str](), False, Lock()
        with disk_errors(path):
            begun = self._begun(offset)
            flags = os.O_RDWR | (0 if begun else os.O_CREAT | os.O_TRUNC)
            self._file = os.open(self._temporary, flags, mode)
            if not begun:
                os.ftruncate(self._file, offset)
                _write(self._file, memoryview(header), 0)

    def _begun(self, size: int) -> bool:
        """Takes over what another run has put, if it was the same file."""
        there = self._temporary.is_file() and self._temporary.stat().st_size == size
        if not there or not self._state.is_file():
            return False
        state = read_json(self._state, MAX_STATE_BYTES)
        if state.get("header") != self._header:
            return False
        self.done = set(state["done"])
        return True

    @property
    def left(self) -> set[str]:
        """Names of the tensors that are not in it."""
        return self._start.keys() - self.done

    def put(self, plan: TensorPlan, value: Array) -> None:
        """Writes a tensor, whole or in pieces along its rows.

        Raises:
            MsQuantError: it is not as planned, or the disk is full.
        """
        offset = self._start[plan.name]
        for piece in checked_pieces(value, plan, self.path):
            with disk_errors(self.path, f"tensor {plan.name!r}"):
                _write(self._file, piece, offset)
            offset += len(piece)
        with self._lock:
            self.done.add(plan.name)
            self._unsaved = True

    def save(self) -> None:
        """What was put is on the disk, and stays in it. Another thread may put more meanwhile."""
        with self._lock:
            if not self._unsaved:
                return
            done, self._unsaved = sorted(self.done), False
        with disk_errors(self.path):
            os.fsync(self._file)
        write_bytes(self._state, json.dumps({"header": self._header, "done": done}).encode())

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
