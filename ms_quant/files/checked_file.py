"""Files that a job reads again, maybe after days: each holds checksums of all that is in it.

They are CRC-32, from zlib. What is to be found is a disk, a cable or a memory that gives other
bits back, not somebody who forges a file: who can change the data can change any digest beside it.
CRC-32 finds every single flipped bit and every burst of 32 bits for certain, and misses other
damage once in 4 billion times. It takes a quarter of a second for each GB, SHA-256 more than twice
as long with instructions of its own and nine times as long without. Every byte is summed as it is
written and as it is read: no file is read a second time for it.

A tensor file keeps them in its last tensor, ``~crc32``: four bytes each for the header, for every
tensor in their order, and for these. The first and the last begin with the file's name, so that one
file is not taken for another.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.files.own import require_own_file
from ms_quant.files.safetensors_file import TensorInfo, open_file
from ms_quant.files.writer import Array, TensorPlan, file_layout, write_file

CHECKSUMS = "~crc32"
CHECKSUM = np.dtype("<u4")


class DamagedFileError(BadFileError):
    """A file of a job is not as the job has written it.

    Args:
        path: the file.
        reason: what is wrong with it.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, reason: str):
        super().__init__(
            f"{path}: is damaged ({reason}), expected it as this job has written it; delete "
            f"{path.parent} to start again"
        )
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return DamagedFileError, (self.path, self.reason)


def name_sum(path: Path) -> int:
    """What checksums of a file begin with."""
    return zlib.crc32(path.name.encode("utf-8", "surrogateescape"))


def summed(sums: Iterable[int], path: Path) -> np.ndarray:
    """Checksums of the parts of a file, and at last that of these, uint32."""
    found = np.fromiter(sums, CHECKSUM)
    return np.append(found, CHECKSUM.type(zlib.crc32(found.data, name_sum(path))))


def is_summed(sums: np.ndarray, path: Path) -> bool:
    """Whether checksums are what they were."""
    return len(sums) > 0 and bool((summed(sums[:-1].tolist(), path) == sums).all())


def write_checked(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a tensor file with checksums, atomically.

    Raises:
        MsQuantError: the disk is full, or a tensor cannot be stored.
    """
    plans = [TensorPlan(name, array.dtype, array.shape) for name, array in arrays.items()]
    count = CHECKSUM.itemsize * (len(plans) + 2)
    plans.append(TensorPlan(CHECKSUMS, np.dtype(np.uint8), (count,)))
    header, layout = file_layout(plans, path, metadata)
    assert layout[-1].name == CHECKSUMS, layout[-1]
    sums = [zlib.crc32(header, name_sum(path))]

    def get(plan: TensorPlan) -> Array:
        if plan.name == CHECKSUMS:
            return summed(sums, path).view(np.uint8)
        array = np.ascontiguousarray(arrays[plan.name]).reshape(plan.shape)
        sums.append(_sum(array))
        return array

    write_file(path, plans, get, metadata)


def _sum(array: np.ndarray) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


class CheckedFile:
    """A file of :func:`write_checked`. What is read of it is compared with its checksum.

    Attributes:
        path: the file.
        tensors: name to place.
        metadata: what the header states besides.

    Raises:
        DamagedFileError: it is no such file.
        MsQuantError: an earlier version has written it, or something else stands under its name.
    """

    def __init__(self, path: Path):
        require_own_file(path)
        try:
            self._file = open_file(path)
        except MsQuantError as error:
            raise DamagedFileError(path, _reason(error, path)) from None
        self.path, self.metadata = path, self._file.metadata
        if CHECKSUMS not in self._file.tensors:
            raise BadFileError(
                f"{path}: has no checksums, expected a file of this version; finish the job with "
                f"the version that began it, or delete {path.parent} to start again"
            )
        self.tensors = {n: one for n, one in self._file.tensors.items() if n != CHECKSUMS}
        self._sums = self._checked_sums()

    def _checked_sums(self) -> dict[str, int]:
        """The checksum of each tensor; that of the header is right."""
        stored = self._read(CHECKSUMS).reshape(-1).view(np.uint8)
        sums = stored.view(CHECKSUM) if stored.size % CHECKSUM.itemsize == 0 else stored[:0]
        header = zlib.crc32(self._bytes(0, self._file.data_start), name_sum(self.path))
        if (
            len(sums) != len(self.tensors) + 2
            or not is_summed(sums, self.path)
            or sums[0] != header
        ):
            raise DamagedFileError(self.path, "its header or its checksums have changed")
        layout = sorted(self.tensors, key=lambda name: (-self.info(name).dtype.itemsize, name))
        return dict(zip(layout, sums[1:-1].tolist(), strict=True))

    def info(self, name: str) -> TensorInfo:
        """Place, type and shape of a tensor."""
        return self._file.info(name)

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor.

        Raises:
            DamagedFileError: it is not what was written, or cannot be read.
        """
        array = self._read(name)
        if _sum(array) != self._sums[name]:
            raise DamagedFileError(self.path, f"tensor {name!r} has changed")
        return array

    def _read(self, name: str) -> np.ndarray:
        try:
            return self._file.read(name)
        except MsQuantError as error:
            raise DamagedFileError(self.path, _reason(error, self.path)) from None

    def _bytes(self, start: int, stop: int) -> bytes:
        try:
            return self._file.read_bytes(start, stop)
        except MsQuantError as error:
            raise DamagedFileError(self.path, _reason(error, self.path)) from None


def _reason(error: MsQuantError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
