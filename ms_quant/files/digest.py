"""A tensor of a file in pieces of bounded size, its hash, and whether its values are finite."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.files.safetensors_file import SafetensorsFile

CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32: bounds every temporary
HASHED_ELEMENTS = 1 << 20  # at a time, by several threads at once
SAMPLES = 64
SAMPLE_BYTES = 4096
BLOCK_ELEMENTS = 1 << 16  # of a check for NaN: what it makes stays in the cache
EXPONENTS = {
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float32": 0x7F800000,
    "float64": 0x7FF << 52,
    "float8_e4m3fn": 0x7F,
    "float8_e8m0fnu": 0xFF,
}
"""The bits that are all set in NaN and infinity and in nothing else."""


def row_chunks(
    file: SafetensorsFile, name: str, rows: slice | None = None, elements: int = CHUNK_ELEMENTS
) -> Iterator[tuple[int, np.ndarray]]:
    """Reads a tensor some rows at a time: (first row, rows). Nothing comes of an empty one."""
    shape = file.info(name).shape
    if not math.prod(shape):
        return
    if not shape:
        yield 0, file.read(name)
        return
    for start, stop in row_ranges(shape, rows, elements):
        yield start, file.read_rows(name, start, stop)


def row_ranges(
    shape: tuple[int, ...], rows: slice | None = None, elements: int = CHUNK_ELEMENTS
) -> Iterator[tuple[int, int]]:
    """First row, and one past the last, of the pieces that a tensor is read in."""
    if not math.prod(shape):
        return
    first, last = (rows.start, rows.stop) if rows else (0, shape[0])
    step = max(1, elements // math.prod(shape[1:]))
    for start in range(first, last, step):
        yield start, min(start + step, last)


def tensor_digest(file: SafetensorsFile, name: str) -> str:
    """The sha256 of a tensor's bytes.

    Raises:
        MsQuantError: it holds NaN or infinity, or the file changed or cannot be read.
    """
    digest, wrong, seen = hashlib.sha256(), 0, 0
    for _, part in row_chunks(file, name, elements=HASHED_ELEMENTS):
        digest.update(part.reshape(-1).view(np.uint8).data)
        wrong, seen = wrong + count_non_finite(part), seen + part.size
    if wrong:
        raise BadFileError(
            f"{file.path}: tensor {name!r} holds {wrong} NaN or infinite values of {seen}, "
            "expected none"
        )
    return digest.hexdigest()


def file_stamp(path: Path) -> list[int]:
    """What changes with a file: also the time of its last change, which nobody can set."""
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def shard_print(file: SafetensorsFile) -> dict[str, Any]:
    """What :func:`~ms_quant.files.reader.fingerprint` knows of one file."""
    samples = hashlib.sha256()
    room = file.size - file.data_start - SAMPLE_BYTES
    for step in range(SAMPLES if room > 0 else 1):
        start = file.data_start + max(room, 0) * step // (SAMPLES - 1)
        samples.update(file.read_bytes(start, min(start + SAMPLE_BYTES, file.size)))
    return {
        "bytes": file.size,
        "header_sha256": hashlib.sha256(file.read_bytes(0, file.data_start)).hexdigest(),
        "samples_sha256": samples.hexdigest(),
    }


def count_non_finite(array: np.ndarray) -> int:
    """How many values of an array are NaN or infinite."""
    if array.dtype.kind in "iu":
        return 0
    if array.dtype.name not in EXPONENTS:
        return array.size - int(np.count_nonzero(np.isfinite(array.astype(np.float32))))
    bits = array.reshape(-1).view(np.dtype(f"u{array.dtype.itemsize}"))
    exponent = bits.dtype.type(EXPONENTS[array.dtype.name])
    wrong = 0
    for start in range(0, bits.size, BLOCK_ELEMENTS):
        masked = bits[start : start + BLOCK_ELEMENTS] & exponent
        if masked.max() == exponent:
            wrong += int(np.count_nonzero(masked == exponent))
    return wrong
