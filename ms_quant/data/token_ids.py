"""Token ids from ``.npz`` and ``.npy``: what a file states is bounded before it is read."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from ms_quant.data.files import MAX_FILE_BYTES
from ms_quant.errors import BadFileError, MsQuantError

MOST_TIMES = 100
"""Ids pack to a quarter; of one id over and over they pack to a thousandth."""
SMALL_BYTES = 64 << 20
"""So much may come of a file however small it is."""
CHUNK_BYTES = 1 << 24
MAX_HEADER_BYTES = 10_000
ARRAY = ".npy"


def read_ids(path: Path) -> np.ndarray:
    """Integers of one or two dimensions from ``.npz`` or ``.npy``.

    Raises:
        MsQuantError: the file is malformed, unpacks to too much, or holds something else.
    """
    with _read_errors(path):
        if path.suffix.lower() != ".npz":
            with path.open("rb") as file:
                _read_header(_beginning(file), path, path.stat().st_size)
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with zipfile.ZipFile(path) as archive:
            member = _member(archive, path)
            with archive.open(member) as file:
                return _read_array(file, path, member.file_size)


def unpacked_bytes(path: Path) -> int:
    """Bytes of the arrays of a file.

    Raises:
        MsQuantError: it is no archive of arrays.
    """
    if path.suffix.lower() != ".npz":
        return path.stat().st_size
    with _read_errors(path), zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """What zipfile, the libraries below it and NumPy raise, as one sentence."""
    try:
        yield
    except MsQuantError:
        raise
    except Exception as error:  # of a dozen kinds, some of which are no public name
        said = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise BadFileError(f"{path}: not a readable {path.suffix} file ({said:.200})") from error


def _member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    """The array that is read, if it does not unpack to too much."""
    found = {entry.filename.removesuffix(ARRAY): entry for entry in archive.infolist()}
    if "tokens" not in found and len(found) != 1:
        names = ", ".join(map(repr, list(found)[:4])) + (", ..." if len(found) > 4 else "")
        raise BadFileError(f"{path}: has the arrays [{names:.200}], expected one named tokens")
    member = found.get("tokens") or next(iter(found.values()))
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadFileError(
            f"{path}: is packed in another way ({member.compress_type}) than numpy.savez and "
            "numpy.savez_compressed do, expected a file of one of them"
        )
    most = min(MAX_FILE_BYTES, max(SMALL_BYTES, MOST_TIMES * member.compress_size))
    if member.file_size > most:
        raise BadFileError(
            f"{path}: {member.file_size} bytes unpacked from {member.compress_size}, expected at "
            f"most {most}"
        )
    return member


def _read_array(file: IO[bytes], path: Path, size: int) -> np.ndarray:
    """An array, read in pieces into its own memory, which is no more than the file has."""
    begun = _beginning(file)
    dtype, shape, in_columns = _read_header(begun, path, size)
    data = np.empty(math.prod(shape), dtype)
    room, filled = data.view(np.uint8), 0
    while filled < len(room):
        count = min(len(room) - filled, CHUNK_BYTES)
        piece = begun.read(count) or file.read(count)
        if not piece:
            raise BadFileError(f"{path}: is cut off, expected {data.nbytes} bytes of ids")
        room[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
        filled += len(piece)
    while file.read(CHUNK_BYTES):  # its end has the checksum of all of it
        pass
    return data.reshape(shape, order="F" if in_columns else "C")


def _beginning(file: IO[bytes]) -> io.BytesIO:
    """What has a header in it, whatever length that states."""
    return io.BytesIO(file.read(MAX_HEADER_BYTES))


def _read_header(file: IO[bytes], path: Path, size: int) -> tuple[np.dtype, tuple[int, ...], bool]:
    """Type, shape and order of an array that has as many bytes as it says.

    Raises:
        MsQuantError: it holds no ids, or more or fewer than the file has room for.
    """
    version = np.lib.format.read_magic(file)
    read: Any = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, in_columns, dtype = read(file, max_header_size=MAX_HEADER_BYTES)
    if dtype.kind not in "iu" or len(shape) not in (1, 2):
        raise BadFileError(
            f"{path}: found {dtype!s:.40} of shape {list(shape)!s:.80}, expected integers of "
            "one or two dimensions"
        )
    if min(shape) < 0 or math.prod(shape) * dtype.itemsize > size:
        raise BadFileError(
            f"{path}: states the shape {list(shape)!s:.80} of {dtype}, expected no more than its "
            f"{size} bytes"
        )
    return dtype, shape, in_columns
