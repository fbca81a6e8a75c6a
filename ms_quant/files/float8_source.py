"""Weights in FP8 (e4m3) with one scale for each block, as DeepSeek and Qwen publish them.

A weight is the product of its code and its block's scale, whatever the scale's name says
(``weight_scale_inv``). Blocks begin at the first row and column; those at the end are cut where
their size does not divide: 576 rows in blocks of 128 have five rows of scales, the last of which
is of 64. Which tensors are stored so their types tell, never their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.files.digest import BLOCK_ELEMENTS
from ms_quant.files.encoded import FLOAT32, SCALE_CODES, FileOf, check_finite, read_scales
from ms_quant.files.safetensors_file import StoredRows, TensorInfo
from ms_quant.numerics.minifloat import E4M3

SCALE = "_scale_inv"
NAN = np.uint8(0x7F)  # all bits but the sign's
VALUES = np.arange(256, dtype=np.uint8).view(E4M3.dtype).astype(np.float32)
"""What each code stands for."""


@dataclass(frozen=True)
class Float8Blocks:
    """A tensor of E4M3 codes; of three dimensions it is a matrix for each expert.

    Attributes:
        weight, scale: names of the stored tensors.
        shape: of the weight.
        block: rows and columns of a block.
    """

    weight: str
    scale: str
    shape: tuple[int, ...]
    block: tuple[int, int]

    @property
    def title(self) -> str:
        return f"FP8 in blocks of {self.block[0]} x {self.block[1]}"

    @property
    def dtype(self) -> np.dtype[Any]:
        return FLOAT32

    @property
    def parts(self) -> tuple[str, ...]:
        return self.weight, self.scale

    def check(self, file_of: FileOf) -> None:
        self._scales(file_of)

    def largest(self, file_of: FileOf, matrix: int | None = None) -> float:
        """See ``Encoding``; of all, or of one matrix of a stack."""
        return E4M3.largest * float(self._scales(file_of, matrix).max(initial=0))

    def _scales(self, file_of: FileOf, matrix: int | None = None) -> np.ndarray:
        file = file_of(self.scale)
        rows = file.info(self.scale).shape[0 if matrix is None else 1]
        return read_scales(file, self.scale, 0, rows, matrix)

    def rows(self, file_of: FileOf, start: int, stop: int, matrix: int | None = None) -> np.ndarray:
        """See ``Encoding``; of all, or of one matrix of a stack."""
        where = f"{file_of(self.weight).path}: tensor {self.weight!r}"
        codes, scales = self._stored(file_of, start, stop, matrix)
        wrong = int(np.count_nonzero(codes & NAN == NAN))
        if wrong:
            raise BadFileError(
                f"{where} holds {wrong} NaN codes in rows {start} to {stop}, expected none"
            )
        values = decode(codes, scales, self.block[1])
        check_finite(values, scales, where)
        return values

    def stored_rows(
        self, file_of: FileOf, start: int, stop: int, matrix: int | None = None
    ) -> StoredRows:
        return StoredRows(*self._stored(file_of, start, stop, matrix), self.block[1])

    def _stored(
        self, file_of: FileOf, start: int, stop: int, matrix: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        codes = file_of(self.weight).read_rows(self.weight, start, stop, matrix).view(np.uint8)
        return codes, self._row_scales(file_of, start, stop, matrix)

    def _row_scales(self, file_of: FileOf, start: int, stop: int, matrix: int | None) -> np.ndarray:
        """The scales of each row, (..., rows, blocks of columns)."""
        file, height = file_of(self.scale), self.block[0]
        if len(self.shape) == 3 and matrix is None:
            scales = read_scales(file, self.scale, start, stop)
            return scales[:, np.arange(self.shape[1]) // height]
        first = start // height
        scales = read_scales(file, self.scale, first, -(-stop // height), matrix)
        return scales[np.arange(start, stop) // height - first]


def decode(codes: np.ndarray, scales: np.ndarray, width: int) -> np.ndarray:
    """The float32 values of uint8 codes (..., K) with scales (..., ceil(K / width)).

    Some rows at a time, so that what is made on the way stays in the cache.
    """
    columns = codes.shape[-1]
    values = np.empty(codes.shape, np.float32)
    given, made = codes.reshape(-1, columns), values.reshape(-1, columns)
    by_row, width = scales.reshape(-1, scales.shape[-1]), min(width, columns)
    step = max(1, BLOCK_ELEMENTS // columns)
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        for start in range(0, len(given), step):
            part = slice(start, start + step)
            np.take(VALUES, given[part], out=made[part], mode="clip")  # the mode without a copy
            made[part] *= np.repeat(by_row[part], width, axis=1)[:, :columns]
    return values


def find_float8(
    stored: Mapping[str, TensorInfo], file_of: FileOf, block: tuple[int, int]
) -> dict[str, Float8Blocks]:
    """The tensors that are stored in FP8, by their names.

    Args:
        stored: every stored tensor.
        file_of: its file, for errors.
        block: rows and columns of a block.

    Raises:
        MsQuantError: a scale has no weight, another type or another shape than its weight's
            blocks, or a weight has no scale; names the tensor.
    """
    found: dict[str, Float8Blocks] = {}
    for name, info in stored.items():
        if info.code != "F8_E4M3":
            continue
        scale = next((other for other in _scale_names(name) if other in stored), "")
        if not scale:
            raise BadFileError(
                f"{file_of(name).path}: tensor {name!r} is F8_E4M3 and has no scale, expected a "
                f"tensor {_scale_names(name)[0]!r}"
            )
        _check_scale(info.shape, stored[scale], block, f"{file_of(scale).path}: tensor {scale!r}")
        found[name] = Float8Blocks(name, scale, info.shape, block)
    claimed = {encoding.scale for encoding in found.values()}
    for name in stored:
        if name.endswith(SCALE) and name not in claimed:
            weight = name.removesuffix(SCALE)
            what = f"is {stored[weight].code}" if weight in stored else "is not there"
            raise BadFileError(
                f"{file_of(name).path}: tensor {name!r} is a scale of {weight!r}, which {what}, "
                "expected F8_E4M3"
            )
    return found


def _scale_names(weight: str) -> list[str]:
    """What the scale of a weight may be called."""
    path, _, suffix = weight.rpartition(".")
    return [f"{weight}{SCALE}", *([f"{path}.scale"] if suffix == "weight" else [])]


def _check_scale(
    shape: tuple[int, ...], scale: TensorInfo, block: tuple[int, int], where: str
) -> None:
    if scale.code not in SCALE_CODES:
        raise BadFileError(f"{where} is {scale.code}, expected one of {', '.join(SCALE_CODES)}")
    if len(shape) not in (2, 3):
        raise BadFileError(f"{where} is of a weight of shape {list(shape)}, expected a matrix")
    rows, columns = (-(-size // step) for size, step in zip(shape[-2:], block, strict=True))
    expected = (*shape[:-2], rows, columns)
    if scale.shape != expected:
        raise BadFileError(
            f"{where} has shape {list(scale.shape)}, expected {list(expected)} for a weight of "
            f"shape {list(shape)} in blocks of {block[0]} x {block[1]}"
        )
