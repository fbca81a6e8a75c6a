"""Weights in int4 or int8 packed in words, with scales of groups of inputs (compressed-tensors).

``weight_packed`` holds the codes, ``weight_scale`` a scale for each group, ``weight_shape`` the
shape. Kimi-K2-Thinking has its experts so. docs/compressed_tensors_format.md states the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.files.encoded import FLOAT32, FileOf, check_finite, read_scales
from ms_quant.files.reader import MODEL_CODES
from ms_quant.files.safetensors_file import TensorInfo
from ms_quant.numerics.pack import WORD_BITS, unpack_words

PACKED, SCALE, SHAPE, ZERO_POINT = (
    f".weight_{part}" for part in ("packed", "scale", "shape", "zero_point")
)


@dataclass(frozen=True)
class PackedGroups:
    """A matrix of packed codes without zero points.

    Attributes:
        path: of its linear.
        shape: (out, in).
        bits: of a code.
        group: inputs that share a scale.
        zeros: whether zero points are stored all the same, as old versions of the library do.
    """

    path: str
    shape: tuple[int, int]
    bits: int
    group: int
    zeros: bool

    @property
    def title(self) -> str:
        return f"int{self.bits} in groups of {self.group}"

    @property
    def dtype(self) -> np.dtype[Any]:
        return FLOAT32

    @property
    def parts(self) -> tuple[str, ...]:
        suffixes = (PACKED, SCALE, SHAPE, *([ZERO_POINT] if self.zeros else []))
        return tuple(self.path + suffix for suffix in suffixes)

    def largest(self, file_of: FileOf) -> float:
        return 2.0 ** (self.bits - 1) * float(self._scales(file_of).max(initial=0))

    def _scales(self, file_of: FileOf) -> np.ndarray:
        name = self.path + SCALE
        return read_scales(file_of(name), name, 0, self.shape[0])

    def check(self, file_of: FileOf) -> None:
        self._scales(file_of)
        self._check_shape(file_of)
        if self.zeros:
            name = self.path + ZERO_POINT
            wrong = int(np.count_nonzero(file_of(name).read(name)))
            if wrong:
                raise BadFileError(
                    f"{file_of(name).path}: tensor {name!r} holds {wrong} values that are not 0, "
                    "expected none: config.json says symmetric"
                )

    def _check_shape(self, file_of: FileOf) -> None:
        name = self.path + SHAPE
        said = file_of(name).read(name).tolist()
        if said != list(self.shape):
            raise BadFileError(
                f"{file_of(name).path}: tensor {name!r} is {said}, expected {list(self.shape)} as "
                "the words have it"
            )

    def rows(self, file_of: FileOf, start: int, stop: int) -> np.ndarray:
        if start == 0:
            self._check_shape(file_of)
        name, scale = self.path + PACKED, self.path + SCALE
        file = file_of(name)
        values = unpack_words(file.read_rows(name, start, stop), name, self.bits).astype(np.float32)
        scales = read_scales(file_of(scale), scale, start, stop)
        groups = values.reshape(stop - start, scales.shape[1], self.group)
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            groups *= scales[:, :, None]
        check_finite(values, scales, f"{file.path}: tensor {name!r}")
        return values

    def stored_rows(self, file_of: FileOf, start: int, stop: int) -> None:
        """Not what :class:`~ms_quant.files.safetensors_file.StoredRows` holds."""


def find_packed(
    stored: Mapping[str, TensorInfo],
    file_of: FileOf,
    layout: Callable[[Sequence[str]], Mapping[str, tuple[int, int]]],
) -> dict[str, PackedGroups]:
    """The weights that are stored packed, by the names of the float tensors.

    Args:
        stored: every stored tensor.
        file_of: its file, for errors.
        layout: from the paths of packed linears to the bits of a code and the size of a group, 0
            for whole rows.

    Raises:
        MsQuantError: a tensor of a weight is missing, left over, or has another type or shape;
            names it.
    """
    paths = [name.removesuffix(PACKED) for name in stored if name.endswith(PACKED)]
    found = {}
    for path, (bits, group) in layout(paths).items():
        found[f"{path}.weight"] = _packed(path, bits, group, stored, file_of)
    known = set(paths)
    for name in stored:
        path, dot, suffix = name.rpartition(".")
        if dot + suffix in (SCALE, SHAPE, ZERO_POINT) and path not in known:
            raise BadFileError(
                f"{file_of(name).path}: holds tensor {name!r} and no {path + PACKED!r}, "
                "expected both"
            )
    return found


def _packed(
    path: str, bits: int, group: int, stored: Mapping[str, TensorInfo], file_of: FileOf
) -> PackedGroups:
    words = _expect(path + PACKED, path, stored, file_of, ("I32",), None)
    rows, columns = words[0], words[1] * WORD_BITS // bits
    size = group or columns
    if not columns or columns % size:
        raise BadFileError(
            f"{file_of(path + PACKED).path}: tensor {path + PACKED!r} has {columns} inputs, "
            f"expected a multiple of the group size {size}"
        )
    _expect(path + SCALE, path, stored, file_of, MODEL_CODES, (rows, columns // size))
    _expect(path + SHAPE, path, stored, file_of, ("I64", "I32"), (2,))
    return PackedGroups(path, (rows, columns), bits, size, path + ZERO_POINT in stored)


def _expect(
    name: str,
    path: str,
    stored: Mapping[str, TensorInfo],
    file_of: FileOf,
    codes: Sequence[str],
    shape: tuple[int, ...] | None,
) -> tuple[int, ...]:
    """The shape of a tensor that there must be; of a matrix where no other is expected."""
    if name not in stored:
        raise BadFileError(
            f"{file_of(path + PACKED).path}: holds tensor {path + PACKED!r} and no {name!r}, "
            "expected both"
        )
    info = stored[name]
    right = len(info.shape) == 2 if shape is None else info.shape == shape
    if info.code not in codes or not right:
        expected = "a matrix" if shape is None else str(list(shape))
        raise BadFileError(
            f"{file_of(name).path}: tensor {name!r} is {info.code} {list(info.shape)}, expected "
            f"{' or '.join(codes)} {expected}"
        )
    return info.shape
