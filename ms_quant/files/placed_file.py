"""A safetensors file whose tensors are written in any order, each to its place, over several runs.

The file grows under the name ``.NAME.placed``; ``.NAME.placed.json`` says which tensors are in it
and on the disk. A kill loses those that were put after the last :meth:`PlacedFile.save`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ms_quant.files.atomic import (
    ANY_MODE,
    FileRecord,
    disk_errors,
    sha256_file,
    sync_directory,
    write_json,
)
from ms_quant.files.strict_json import read_json
from ms_quant.files.writer import Array, TensorPlan, checked_pieces, file_layout
from ms_quant.progress import PartProgress

MAX_STATE_BYTES = 64 << 20
ENDING = r"\.placed(\.json)?"
"""What a pattern for the names of such files adds to ``.NAME``."""
SAVED_SECONDS = 2.0
"""What a kill loses at most of :func:`fill`, beside the parts that are being made and written."""


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
        self.done, self._unsaved = set[str](), False
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
        self.done.add(plan.name)
        self._unsaved = True

    def save(self) -> None:
        """What was put is on the disk, and stays in it."""
        if not self._unsaved:
            return
        with disk_errors(self.path):
            os.fsync(self._file)
        write_json(self._state, {"header": self._header, "done": sorted(self.done)})
        self._unsaved = False

    def close(self) -> None:
        """Lets go of the file, whole or not."""
        os.close(self._file)

    def finish(self) -> FileRecord:
        """Gives the file its name; all tensors are in it."""
        assert not self.left, self.left
        with disk_errors(self.path):
            os.fsync(self._file)
            self.close()
            self._temporary.replace(self.path)
            sync_directory(self.path.parent)
            self._state.unlink(missing_ok=True)
        return FileRecord(self.path.name, self.path.stat().st_size, sha256_file(self.path))


def fill(
    file: PlacedFile,
    parts: Iterable[Sequence[TensorPlan]],
    value: Callable[[TensorPlan], Array],
    total: int,
    told: PartProgress,
) -> FileRecord:
    """Writes what is left of a file, each part while the next is made.

    Args:
        file: the file, new or begun.
        parts: its tensors; those of one part are made together.
        value: makes a tensor.
        total: bytes of all tensors.
        told: told how much is written, 0 to 1.

    Raises:
        MsQuantError: a tensor cannot be made, is not as planned, or the disk is full.
    """
    done, saved = 0, time.monotonic()
    writing: Future[None] | None = None
    try:
        with ThreadPoolExecutor(1) as writer:
            for part in parts:
                left = [tensor for tensor in part if tensor.name not in file.done]
                values = [(tensor, value(tensor)) for tensor in left]
                if writing is not None:
                    writing.result()
                save = time.monotonic() - saved >= SAVED_SECONDS
                saved = time.monotonic() if save else saved
                writing = writer.submit(_put, file, values, save)
                done += sum(tensor.bytes for tensor in part)
                told(done / (total or 1))
            if writing is not None:
                writing.result()
    except BaseException:
        file.close()
        raise
    return file.finish()


def _put(file: PlacedFile, values: Sequence[tuple[TensorPlan, Array]], save: bool) -> None:
    for tensor, value in values:
        file.put(tensor, value)
    if save:
        file.save()


def _write(file: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count
