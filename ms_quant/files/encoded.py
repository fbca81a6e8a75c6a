"""A float model some of whose tensors are stored as codes and scales, read as what those stand for.

Nothing is written: a tensor is decoded when it is read, some rows at a time, in float32, which the
product of a code and its scale is rounded to once. The tensors that it is made of are not seen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.files.digest import CHUNK_ELEMENTS, row_ranges
from ms_quant.files.reader import Checkpoint
from ms_quant.files.safetensors_file import DTYPES, SafetensorsFile, StoredRows, TensorInfo
from ms_quant.numerics.minifloat import E4M3

DECODED_METHODS = ("fp8", "compressed-tensors")
"""Values of ``quant_method`` of models that may be read as float ones."""
FLOAT32 = np.dtype(np.float32)
LARGEST_SCALE = np.finfo(np.float32).max / E4M3.largest
"""Times any code, a scale up to this fits float32."""
SCALE_CODES = ("F32", "BF16", "F8_E8M0", "U8")
FileOf = Callable[[str], SafetensorsFile]
"""From the name of a stored tensor to its file."""


class Encoding(Protocol):
    """How one float tensor is stored.

    Attributes:
        title: in a few words, such as ``"FP8 in blocks of 128 x 128"``.
        dtype: of its values as they are read.
        shape: of the float tensor.
        parts: the stored tensors that it is made of: its codes, its scales, others.
    """

    @property
    def title(self) -> str: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def parts(self) -> tuple[str, ...]: ...

    def check(self, file_of: FileOf) -> None:
        """Refuses scales and shapes whose values are none that they may have."""

    def largest(self, file_of: FileOf) -> float:
        """A number that no magnitude in it exceeds, by its scales alone."""

    def rows(self, file_of: FileOf, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` (exclusive), finite, an array of its own."""

    def stored_rows(self, file_of: FileOf, start: int, stop: int) -> StoredRows | None:
        """See :meth:`~ms_quant.files.reader.Checkpoint.stored_rows`."""


class EncodedCheckpoint(Checkpoint):
    """The float tensors of a model directory, whether they are stored as such or encoded.

    Args:
        directory: the model directory.
        find: from the stored tensors to what is encoded, by the names of the float tensors.
        rename: see :class:`~ms_quant.files.reader.Checkpoint`.

    Attributes:
        encodings: how each encoded tensor is stored.

    Raises:
        MsQuantError: besides what ``Checkpoint`` refuses, what ``find`` does; or a float tensor
            is there twice.
    """

    def __init__(
        self,
        directory: Path | str,
        find: Callable[[Mapping[str, TensorInfo], FileOf], Mapping[str, Encoding]],
        rename: Callable[[str], str] | None = None,
    ) -> None:
        self._parts: dict[str, Encoding] = {}
        super().__init__(directory, rename=rename)
        stored = self.stored()
        self.encodings = dict(find(stored, self._stored_in))
        self._parts = {part: e for e in self.encodings.values() for part in e.parts}
        for name, encoding in self.encodings.items():
            if name in stored and name not in encoding.parts:
                raise BadFileError(
                    f"{self._stored_in(name).path}: holds tensor {name!r}, expected it only as "
                    f"{encoding.parts[0]!r}"
                )
        self._names = sorted((stored.keys() - self._parts.keys()) | self.encodings.keys())
        self._known = frozenset(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def notes(self) -> list[str]:
        """What to know about how tensors are stored, one sentence each."""
        counted = Counter((e.title, self.is_coded(name)) for name, e in self.encodings.items())
        coded_how = "decoded as they are read, and quantized from float32"
        return [
            f"{self.directory}: {count} weights are stored as {title}; they are "
            + (coded_how if coded else "read one by one")
            for (title, coded), count in counted.items()
        ]

    def is_coded(self, name: str) -> bool:
        """Whether a tensor is stored as codes with scales."""
        return name in self.encodings and len(self.encodings[name].parts) > 1

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor; of an encoded one as in a file of its own."""
        encoding = self.encodings.get(name)
        if encoding is None:
            return super().info(name)
        size = encoding.dtype.itemsize * math.prod(encoding.shape)
        return TensorInfo(encoding.dtype, encoding.shape, 0, size)

    def file_of(self, name: str) -> SafetensorsFile:
        """The opened file that holds a tensor, or the codes of an encoded one."""
        encoding = self.encodings.get(name)
        return self._stored_in(name if encoding is None else encoding.parts[0])

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor in the dtype it is stored in, one of codes in float32."""
        if name not in self.encodings:
            return super().read(name)
        info = self.info(name)
        array = np.empty(info.shape, info.dtype)
        for start, part in self.float_chunks(name):
            array[start : start + len(part)] = part
        return array

    def place(self, name: str) -> str:
        stored = self.encodings[name].parts[0] if name in self.encodings else name
        place = super().place(name)
        return place if stored == name else f"{place} in {stored!r}"

    def float_chunks(
        self,
        name: str,
        rows: slice | None = None,
        *,
        elements: int | None = None,
        dtype: np.dtype | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """As ``Checkpoint.float_chunks``; a tensor of codes comes in float32."""
        encoding = self.encodings.get(name)
        if encoding is None:
            yield from super().float_chunks(name, rows, elements=elements, dtype=dtype)
            return
        for part in encoding.parts:
            self._prove(part)
        for start, stop in row_ranges(encoding.shape, rows, elements or CHUNK_ELEMENTS):
            found = encoding.rows(self._stored_in, start, stop)
            yield start, found if dtype is None else found.astype(dtype, copy=False)

    def stored_rows(self, name: str, start: int, stop: int) -> StoredRows | None:
        encoding = self.encodings.get(name)
        if encoding is None:
            return super().stored_rows(name, start, stop)
        for part in encoding.parts:
            self._prove(part)
        return encoding.stored_rows(self._stored_in, start, stop)

    def largest(self, name: str) -> float:
        encoding = self.encodings.get(name)
        return super().largest(name) if encoding is None else encoding.largest(self._stored_in)

    def check_part(self, name: str) -> None:
        encoding = self._parts.get(name)
        if encoding is not None and name in encoding.parts[1:2]:
            encoding.check(self._stored_in)

    def _decides(self, file: SafetensorsFile, name: str) -> bool:
        return name in self._parts or super()._decides(file, name)


def read_scales(
    file: SafetensorsFile, name: str, start: int, stop: int, matrix: int | None = None
) -> np.ndarray:
    """Rows of scales as float32, see :meth:`SafetensorsFile.read_rows`; uint8 is E8M0.

    Raises:
        MsQuantError: one is not a positive number; names the tensor.
    """
    stored = file.read_rows(name, start, stop, matrix)
    if stored.dtype.kind == "u":
        stored = stored.view(DTYPES["F8_E8M0"])
    scales = stored.astype(np.float32)
    wrong = scales.size - int(np.count_nonzero((scales > 0) & np.isfinite(scales)))
    if wrong:
        raise BadFileError(
            f"{file.path}: tensor {name!r} holds {wrong} scales of {scales.size} that are zero, "
            "negative, NaN or infinite, expected positive numbers"
        )
    return scales


def check_finite(values: np.ndarray, scales: np.ndarray, where: str) -> None:
    """Refuses products of codes and scales that are too large for float32."""
    if scales.size and scales.max() > LARGEST_SCALE and not np.isfinite(values).all():
        raise BadFileError(
            f"{where} has a scale of {scales.max():g}, expected values that fit float32"
        )
