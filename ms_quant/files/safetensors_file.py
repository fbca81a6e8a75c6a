"""One safetensors file, read strictly.

The format: an unsigned 64-bit little-endian header length, the header (a JSON object: tensor name
to dtype, shape and byte range), then the bytes of the tensors without holes or overlap. The header
is read here and not by the safetensors library because older versions know no bfloat16 in NumPy,
and because a refusal should name the tensor, what was found and what was expected.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.files.strict_json import parse_json, require_file

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 32  # the limit of NumPy 1
MAX_ELEMENTS = 1 << 48  # an empty tensor may still state absurd dimensions
LENGTH_BYTES = 8

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
CODES: dict[np.dtype[Any], str] = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is.

    Attributes:
        start: first byte, counted from the beginning of the file.
        stop: one past the last byte.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def code(self) -> str:
        """The dtype as safetensors writes it, such as ``"BF16"``."""
        return CODES[self.dtype]


@dataclass(frozen=True)
class StoredRows:
    """Rows of a float matrix as they are stored, of which nothing is checked.

    Attributes:
        values: (rows, columns), bfloat16, or E4M3 as uint8.
        scales: of E4M3, float32 (rows, runs of ``width`` columns), positive and finite.
        width: of a run, the last of which may be shorter.
    """

    values: np.ndarray
    scales: np.ndarray | None = None
    width: int = 1


@dataclass(frozen=True)
class SafetensorsFile:
    """A checked file. It holds no descriptor: every read opens the file and sees that it is
    still the one that was checked.

    Attributes:
        path: the file.
        tensors: name to place, in the order of the header.
        metadata: the ``__metadata__`` of the header.
        data_start: where the tensors begin; the header ends there.
        size: the file's size.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    size: int
    _stamp: tuple[int, int, int] = field(repr=False)

    def info(self, name: str) -> TensorInfo:
        """Place, dtype and shape of one tensor.

        Raises:
            MsQuantError: the file has no such tensor.
        """
        if name not in self.tensors:
            raise BadFileError(f"{self.path}: has no tensor {name!r}")
        return self.tensors[name]

    def stated(self, key: str, maker: str) -> Any:
        """What the header's metadata states as JSON.

        Args:
            key (str): its name there.
            maker (str): what writes such files, for errors.

        Raises:
            MsQuantError: it is missing, or is no JSON.
        """
        where = f"{self.path}: {key} in the header"
        if key not in self.metadata:
            raise BadFileError(f"{where}: missing, expected a file of {maker}")
        try:
            return parse_json(self.metadata[key].encode())
        except ValueError as error:
            raise BadFileError(f"{where}: not valid JSON ({error})") from None

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor.

        Args:
            name (str): the tensor.

        Returns:
            numpy.ndarray, an array of its own: no file page stays mapped.

        Raises:
            MsQuantError: there is no such tensor, or the file changed or cannot be read.
        """
        info = self.info(name)
        return self._read_array(info, info.shape, info.start)

    def read_rows(self, name: str, start: int, stop: int, matrix: int | None = None) -> np.ndarray:
        """Reads rows ``start`` to ``stop`` (exclusive) along the first axis.

        Args:
            name (str): the tensor, of at least one dimension.
            start (int): the first row.
            stop (int): one past the last row.
            matrix (int, optional): of which matrix along the first axis the rows are, which are
                along the second then.

        Returns:
            numpy.ndarray, of shape ``(stop - start, ...)``.

        Raises:
            MsQuantError: there is no such tensor, the rows are outside of it, or the file changed
                or cannot be read.
        """
        info = self.info(name)
        axis = 0 if matrix is None else 1
        rows = info.shape[axis] if len(info.shape) > axis else 0
        if len(info.shape) <= axis or not 0 <= start <= stop <= rows:
            raise BadFileError(
                f"{self.path}: tensor {name!r} has shape {list(info.shape)}, expected rows "
                f"{start} to {stop}"
            )
        inner = info.shape[axis + 1 :]
        row_bytes = math.prod(inner) * info.dtype.itemsize
        first = start + rows * (matrix or 0)
        return self._read_array(info, (stop - start, *inner), info.start + first * row_bytes)

    def read_bytes(self, start: int, stop: int) -> bytes:
        """The bytes ``start`` to ``stop`` (exclusive) of the file."""
        buffer = np.empty(stop - start, np.uint8)
        self._fill(buffer, start)
        return buffer.tobytes()

    def _read_array(self, info: TensorInfo, shape: tuple[int, ...], start: int) -> np.ndarray:
        array = np.empty(shape, info.dtype)
        self._fill(array.reshape(-1).view(np.uint8), start)
        return array

    def _fill(self, buffer: np.ndarray, start: int) -> None:
        view = buffer.data
        with _read_errors(self.path), self.path.open("rb", buffering=0) as file:
            if _stamp(os.fstat(file.fileno())) != self._stamp:
                raise BadFileError(f"{self.path}: changed since it was opened")
            file.seek(start)
            while len(view):
                count = file.readinto(view)
                if not count:
                    raise BadFileError(f"{self.path}: truncated while it was read")
                view = view[count:]


def open_file(path: Path | str) -> SafetensorsFile:
    """Opens a safetensors file and checks all of its header against its size.

    Args:
        path (Path | str): the file.

    Returns:
        SafetensorsFile, whose tensors are all known to lie within the file.

    Raises:
        MsQuantError: the file is missing, truncated, too long, or its header is malformed.
    """
    path = Path(path)
    require_file(path)
    with _read_errors(path), path.open("rb") as file:
        status = os.fstat(file.fileno())
        length = _header_length(file.read(LENGTH_BYTES), status.st_size, path)
        header = _parse_header(file.read(length), path)
    metadata = _metadata(header.pop("__metadata__", {}), path)
    data_start = LENGTH_BYTES + length
    tensors = {
        name: _tensor_info(entry, data_start, f"{path}: tensor {name!r}")
        for name, entry in header.items()
    }
    _check_layout(tensors, data_start, status.st_size, path)
    return SafetensorsFile(path, tensors, metadata, data_start, status.st_size, _stamp(status))


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read ({error.strerror or error})") from error


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _header_length(prefix: bytes, size: int, path: Path) -> int:
    if len(prefix) < LENGTH_BYTES:
        raise BadFileError(f"{path}: truncated, {size} bytes, expected at least {LENGTH_BYTES}")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise BadFileError(
            f"{path}: states a header of {length} bytes, expected at most {MAX_HEADER_BYTES}; "
            "it is not a safetensors file"
        )
    if LENGTH_BYTES + length > size:
        raise BadFileError(
            f"{path}: truncated, {size} bytes, expected at least {LENGTH_BYTES + length}"
        )
    return length


def _parse_header(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        header = parse_json(raw)
    except ValueError as error:
        raise BadFileError(f"{path}: the header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise BadFileError(
            f"{path}: the header is a JSON {type(header).__name__}, expected an object"
        )
    return header


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise BadFileError(f"{path}: __metadata__ is {value!r:.80}, expected strings by name")
    return value


def _tensor_info(entry: Any, data_start: int, where: str) -> TensorInfo:
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise BadFileError(f"{where}: has {found!r:.80}, expected dtype, shape, data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise BadFileError(f"{where}: dtype {code!r:.80}, expected one of {', '.join(DTYPES)}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise BadFileError(f"{where}: shape {shape!r:.80}, expected non-negative integers")
    if math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        raise BadFileError(f"{where}: shape {shape!r:.80}, expected at most {MAX_ELEMENTS} values")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadFileError(f"{where}: data_offsets {offsets!r:.80}, expected [start, stop]")
    expected = math.prod(shape) * DTYPES[code].itemsize
    if offsets[1] - offsets[0] != expected:
        raise BadFileError(
            f"{where}: data_offsets span {offsets[1] - offsets[0]} bytes, expected {expected} for "
            f"{code} {shape}"
        )
    return TensorInfo(DTYPES[code], tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(tensors: dict[str, TensorInfo], data_start: int, size: int, path: Path) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    end = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            defect = "overlaps the tensor before it" if info.start < end else "leaves a hole"
            raise BadFileError(
                f"{path}: tensor {name!r} {defect}, data_offsets start at "
                f"{info.start - data_start}, expected {end - data_start}"
            )
        end = info.stop
    if size != end:
        defect = "truncated" if size < end else "too long"
        raise BadFileError(f"{path}: {defect}, {size} bytes, expected {end}")
