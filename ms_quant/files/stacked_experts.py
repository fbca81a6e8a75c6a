"""Experts of a layer that one tensor holds, read as a matrix for each expert.

Checkpoints have ``mlp.experts.3.gate_proj.weight``; what newer writers hold in memory, and some
write, is ``mlp.experts.gate_up_proj`` [experts, 2 * inner, hidden], rows of gate first, and
``mlp.experts.down_proj`` [experts, hidden, inner], or a stack for each projection. Only the bytes
of the expert that is asked for are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.files.digest import count_non_finite
from ms_quant.files.encoded import Encoding, FileOf
from ms_quant.files.reader import MODEL_CODES
from ms_quant.files.safetensors_file import StoredRows, TensorInfo

Find = Callable[[Mapping[str, TensorInfo], FileOf], Mapping[str, Encoding]]
_STACK = re.compile(r"(.+\.experts)\.(gate_up_proj|gate_proj|up_proj|down_proj)(\.weight)?")
_HALVES = {"gate_up_proj": ("gate_proj", "up_proj")}


class Stack(Encoding, Protocol):
    """A tensor of three dimensions: a matrix for each expert."""

    def largest(self, file_of: FileOf, matrix: int | None = None) -> float:
        """A number that no magnitude in one matrix exceeds, or in all."""

    def rows(self, file_of: FileOf, start: int, stop: int, matrix: int | None = None) -> np.ndarray:
        """Rows of one matrix, or matrices of the whole."""

    def stored_rows(
        self, file_of: FileOf, start: int, stop: int, matrix: int | None = None
    ) -> StoredRows | None:
        """The same as they are stored."""


@dataclass(frozen=True)
class FloatStack:
    """A stack in a float type.

    Attributes:
        name: of the stored tensor.
        info: its type and shape.
    """

    name: str
    info: TensorInfo
    title = ""

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.name,)

    def check(self, file_of: FileOf) -> None:
        """Nothing beside NaN and infinity is refused."""

    def largest(self, file_of: FileOf, matrix: int | None = None) -> float:
        return float(ml_dtypes.finfo(self.dtype).max)

    def rows(self, file_of: FileOf, start: int, stop: int, matrix: int | None = None) -> np.ndarray:
        file = file_of(self.name)
        found = file.read_rows(self.name, start, stop, matrix)
        wrong = count_non_finite(found)
        if wrong:
            raise BadFileError(
                f"{file.path}: tensor {self.name!r} holds {wrong} NaN or infinite values of "
                f"{found.size} of expert {matrix}, expected none"
            )
        return found

    def stored_rows(
        self, file_of: FileOf, start: int, stop: int, matrix: int | None = None
    ) -> StoredRows | None:
        if self.info.code != "BF16":
            return None
        return StoredRows(file_of(self.name).read_rows(self.name, start, stop, matrix))


@dataclass(frozen=True)
class StackedMatrix:
    """The matrix of one expert, or rows of it, in a stack.

    Attributes:
        stack: that it is in.
        expert: which matrix it is.
        first: its first row there.
        shape: (out, in).
    """

    stack: Stack
    expert: int
    first: int
    shape: tuple[int, int]

    @property
    def title(self) -> str:
        coded = f", {self.stack.title}" if self.stack.title else ""
        return f"stacks of all experts of a layer{coded}"

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.stack.dtype

    @property
    def parts(self) -> tuple[str, ...]:
        return self.stack.parts

    def check(self, file_of: FileOf) -> None:
        self.stack.check(file_of)

    def largest(self, file_of: FileOf) -> float:
        return self.stack.largest(file_of, self.expert)

    def rows(self, file_of: FileOf, start: int, stop: int) -> np.ndarray:
        return self.stack.rows(file_of, self.first + start, self.first + stop, self.expert)

    def stored_rows(self, file_of: FileOf, start: int, stop: int) -> StoredRows | None:
        first = self.first
        return self.stack.stored_rows(file_of, first + start, first + stop, self.expert)


def is_stack(name: str) -> bool:
    """Whether a tensor is a stack by its name."""
    return _STACK.fullmatch(name) is not None


def find_stacked(
    stored: Mapping[str, TensorInfo], file_of: FileOf, find: Find | None = None
) -> dict[str, Encoding]:
    """The encoded tensors, those in stacks by the names that each expert's matrices have.

    Args:
        stored: every stored tensor.
        file_of: its file, for errors.
        find: finds what is stored as codes; None where nothing is.

    Raises:
        MsQuantError: what ``find`` refuses; a stack has another shape or type than one has, or a
            matrix is in two of them; names the tensor.
    """
    found = dict(find(stored, file_of)) if find else {}
    made: dict[str, StackedMatrix] = {}
    for name in [name for name in stored if is_stack(name)]:
        for key, matrix in _matrices(name, _stack(name, found, stored, file_of), file_of):
            if key in made:
                raise BadFileError(
                    f"{file_of(name).path}: tensor {name!r} holds {key!r}, as does "
                    f"{made[key].parts[0]!r}, expected it once"
                )
            made[key] = matrix
        found.pop(name, None)
    return {**found, **made}


def _stack(
    name: str, found: Mapping[str, Encoding], stored: Mapping[str, TensorInfo], file_of: FileOf
) -> Stack:
    encoding, info = found.get(name), stored[name]
    stack: Any = FloatStack(name, info) if encoding is None else encoding
    if encoding is None and info.code not in MODEL_CODES:
        raise BadFileError(
            f"{file_of(name).path}: tensor {name!r} has dtype {info.code}, expected one of "
            f"{', '.join(MODEL_CODES)}"
        )
    if len(stack.shape) != 3:
        raise BadFileError(
            f"{file_of(name).path}: tensor {name!r} has shape {list(stack.shape)}, expected three "
            "dimensions: a matrix for each expert"
        )
    return stack


def _matrices(name: str, stack: Stack, file_of: FileOf) -> list[tuple[str, StackedMatrix]]:
    """The matrices of a stack by the names that they have on their own."""
    parts = _STACK.fullmatch(name)
    assert parts is not None
    module, kind = parts[1], parts[2]
    experts, rows, columns = stack.shape
    names = _HALVES.get(kind, (kind,))
    size = rows // len(names)
    if size * len(names) != rows:
        raise BadFileError(
            f"{file_of(name).path}: tensor {name!r} has shape {list(stack.shape)}, expected an "
            "even number of rows for each expert: those of gate_proj, then those of up_proj"
        )
    return [
        (
            f"{module}.{expert}.{part}.weight",
            StackedMatrix(stack, expert, size * index, (size, columns)),
        )
        for expert in range(experts)
        for index, part in enumerate(names)
    ]
