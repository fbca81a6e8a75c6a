"""Hidden states on disk, which a job writes once and reads again, maybe after it was killed.

The file is a ``.npy`` of float32. After the numbers come checksums, uint32: of the header, of
every piece of some rows, and of these (see :mod:`~ms_quant.files.checked_file`). NumPy reads the
file as it does any other.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np

from ms_quant.files.atomic import disk_errors, sync_directory
from ms_quant.files.checked_file import (
    CHECKSUM,
    DamagedFileError,
    is_summed,
    name_sum,
    summed,
)
from ms_quant.files.own import open_new, open_own, require_own_file

PIECE_BYTES = 1 << 20
"""Of a checksum; one row where a row is larger."""


def _header(shape: tuple[int, ...]) -> bytes:
    described = np.lib.format.header_data_from_array_1_0(np.empty((0,), np.float32))
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {**described, "shape": shape})
    return file.getvalue()


class _Layout:
    """Where what is in a file of states of a shape."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape, self.header = shape, _header(shape)
        self.row_bytes = math.prod(shape[1:]) * np.dtype(np.float32).itemsize
        self.piece = max(1, PIECE_BYTES // max(1, self.row_bytes))  # rows
        self.pieces = -(-shape[0] // self.piece)
        self.data_stop = len(self.header) + shape[0] * self.row_bytes
        self.size = self.data_stop + CHECKSUM.itemsize * (self.pieces + 2)


class HiddenStates:
    """Hidden states on disk, written row by row and renamed when whole.

    Args:
        path: the final name.
        shape: (sequences, tokens, hidden).
    """

    def __init__(self, path: Path, shape: tuple[int, ...]):
        self.path, self._layout = path, _Layout(shape)
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._sums = [zlib.crc32(self._layout.header, name_sum(path))]
        self._sum, self._left = 0, self._layout.piece
        with disk_errors(path, "hidden states"):
            self.temporary.unlink(missing_ok=True)
            self.file = io.BufferedWriter(open_new(self.temporary))
            self.file.write(self._layout.header)

    def append(self, rows: np.ndarray) -> None:
        data = np.ascontiguousarray(rows, np.float32).reshape(-1, *self._layout.shape[1:])
        start = 0
        while start < len(data):
            part = data[start : start + self._left]
            self._sum = zlib.crc32(part.reshape(-1).view(np.uint8).data, self._sum)
            start, self._left = start + len(part), self._left - len(part)
            if not self._left:
                self._end_piece()
        with disk_errors(self.path, "hidden states"):
            self.file.write(data.data)

    def _end_piece(self) -> None:
        self._sums.append(self._sum)
        self._sum, self._left = 0, self._layout.piece

    def commit(self) -> None:
        if self._left < self._layout.piece:
            self._end_piece()
        with disk_errors(self.path, "hidden states"):
            self.file.write(summed(self._sums, self.path).data)
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.temporary.replace(self.path)
            sync_directory(self.path.parent)


class StoredStates:
    """Hidden states that were written. A piece is compared with its checksum when it is first read.

    Args:
        path: the file.
        shape: of what was written.

    Raises:
        DamagedFileError: the file is not there or not as it was written.
        MsQuantError: something else stands under its name.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]):
        self.path, self.shape, self._layout = path, shape, _Layout(shape)
        require_own_file(path)
        try:
            self._file = os.fdopen(open_own(path, os.O_RDONLY), "rb", buffering=0)
        except OSError as error:
            raise DamagedFileError(path, f"cannot be read, {error.strerror or error}") from None
        self._sums = self._checked_sums()
        self._right = np.zeros(self._layout.pieces, bool)

    def _checked_sums(self) -> np.ndarray:
        layout, size = self._layout, os.fstat(self._file.fileno()).st_size
        if size != layout.size:
            raise DamagedFileError(self.path, f"{size} bytes, not {layout.size}")
        sums = np.frombuffer(self._read(layout.data_stop, layout.size), CHECKSUM)
        header = self._read(0, len(layout.header))
        if (
            bytes(header) != layout.header
            or not is_summed(sums, self.path)
            or sums[0] != zlib.crc32(header, name_sum(self.path))
        ):
            raise DamagedFileError(self.path, "its header or its checksums have changed")
        return sums[1:-1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Some rows next to each other, float32, an array of their own."""
        start, stop, _ = rows.indices(len(self))
        return self._rows(start, max(start, stop))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Some rows along the first axes, of what is two-dimensional without the last one."""
        inner = self.shape[-1]
        in_row = math.prod(self.shape[1:-1])
        for piece in np.unique(rows // (in_row * self._layout.piece)).tolist():
            self._check_piece(piece)
        return np.array(self._mapped.reshape(-1, inner)[rows])

    @cached_property
    def _mapped(self) -> np.ndarray:
        """The numbers; what is read of them was checked."""
        return np.memmap(
            self._file, np.float32, mode="r", offset=len(self._layout.header), shape=self.shape
        )

    def _rows(self, start: int, stop: int) -> np.ndarray:
        """Rows, read with the pieces around them where these were not checked."""
        if start == stop:
            return np.empty((0, *self.shape[1:]), np.float32)
        piece = self._layout.piece
        first, last = start // piece, -(-stop // piece)
        if self._right[first:last].all():
            return self._at(start, stop)
        begin = first * piece
        found = self._at(begin, min(last * piece, len(self)))
        for index in range(first, last):
            self._compare(index, found[index * piece - begin : (index + 1) * piece - begin])
        return found[start - begin : stop - begin]

    def _check_piece(self, index: int) -> None:
        if not self._right[index]:
            start = index * self._layout.piece
            self._compare(index, self._at(start, min(start + self._layout.piece, len(self))))

    def _compare(self, index: int, rows: np.ndarray) -> None:
        if zlib.crc32(rows.reshape(-1).view(np.uint8).data) != self._sums[index]:
            raise DamagedFileError(self.path, "its numbers have changed")
        self._right[index] = True

    def _at(self, start: int, stop: int) -> np.ndarray:
        layout = self._layout
        begin = len(layout.header)
        found = self._read(begin + start * layout.row_bytes, begin + stop * layout.row_bytes)
        return np.frombuffer(found, np.float32).reshape(stop - start, *self.shape[1:])

    def _read(self, start: int, stop: int) -> bytearray:
        buffer = bytearray(stop - start)
        view = memoryview(buffer)
        try:
            self._file.seek(start)
            while len(view):
                count = self._file.readinto(view)
                if not count:
                    raise DamagedFileError(self.path, "it was cut off")
                view = view[count:]
        except OSError as error:
            raise DamagedFileError(self.path, f"cannot be read, {error}") from None
        return buffer
