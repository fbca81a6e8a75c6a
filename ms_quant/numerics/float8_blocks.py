"""Float8 e4m3 with one scale for each square block of a weight, and for each group of a token.

The weights of compressed-tensors' FP8_BLOCK and of DeepSeek-V3: blocks of 128 outputs, the last
ones short where 128 does not divide, and 128 inputs. Inputs come in groups of 128, none of them
short: neither vLLM nor the library computes with one. A scale is max(absmax, 1e-12) / 448, as a
row's is in :mod:`ms_quant.numerics.minifloat`.

In memory a grid has the scales of a block once for each of its rows, (out, blocks of inputs), so
that rows can be taken apart; :func:`by_block` and :func:`by_row` change between that and what is
stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ms_quant.numerics import minifloat
from ms_quant.numerics.grid import FLOAT32, Clip, check_group, columns_of, stored_scale
from ms_quant.numerics.minifloat import E4M3, Rounding

BLOCK = 128


def by_block(scale: np.ndarray, rows: int = BLOCK) -> np.ndarray:
    """(ceil(out / rows), n) of scales (out, n) that are equal in each block of rows."""
    return scale[::rows]


def by_row(scale: np.ndarray, out: int, rows: int = BLOCK) -> np.ndarray:
    """(out, n) of the scales of blocks; inverts :func:`by_block`."""
    return np.repeat(scale, rows, axis=0)[:out]


def block_scales(weight: np.ndarray, name: str, size: int = BLOCK) -> np.ndarray:
    """The scale of each block.

    Args:
        weight: float array (out, in).
        name: the tensor's name, for the error.
        size: rows and columns of a block.

    Returns:
        float32 (ceil(out / size), in / size).

    Raises:
        MsQuantError: a value is NaN or infinite.
    """
    rows, columns = weight.shape
    magnitude = np.abs(minifloat.finite_float32(weight, name))
    absmax = magnitude.reshape(rows, columns // size, size).max(axis=2)
    if rows:
        absmax = np.maximum.reduceat(absmax, np.arange(0, rows, size), axis=0)
    return np.maximum(absmax, minifloat.SMALLEST_ABSMAX) / np.float32(E4M3.largest)


@dataclass(frozen=True)
class Float8BlockFormat:
    """E4M3 with one scale for each block of ``row_block`` outputs and ``group_size`` inputs."""

    group_size = BLOCK
    row_block = BLOCK
    bits = 8
    symmetric = True
    clips = False
    integer = False

    def check_columns(self, columns: int, name: str) -> None:
        check_group(self.group_size, columns, name)

    def fit(
        self, weight: np.ndarray, name: str, scale_dtype: np.dtype = FLOAT32, clip: Clip = 1.0
    ) -> Float8BlockGrid:
        self.check_columns(weight.shape[1], name)
        scale = stored_scale(block_scales(weight, name), scale_dtype, name)
        return Float8BlockGrid(by_row(scale, len(weight)), scale_dtype, name)

    def grid(self, arrays: Mapping[str, np.ndarray]) -> Float8BlockGrid:
        return Float8BlockGrid(arrays["weight_scale"])


@dataclass
class Float8BlockGrid:
    """Attributes:
    scale: float32 (out, in / 128), equal in the rows of a block.
    scale_dtype, name: as given to ``fit``.
    """

    scale: np.ndarray
    scale_dtype: np.dtype = FLOAT32
    name: str = "weight"
    group = BLOCK

    def round(self, weight: np.ndarray, start: int = 0) -> np.ndarray:
        steps = minifloat.finite_float32(weight, self.name) / self._at(start, weight.shape[1])
        return minifloat.encode(steps, E4M3, Rounding.HALF_EVEN, self.name)

    def values(self, codes: np.ndarray, start: int = 0) -> np.ndarray:
        return minifloat.decode(codes, E4M3, self.name) * self._at(start, codes.shape[1])

    def _at(self, start: int, count: int) -> np.ndarray:
        return columns_of(self.scale, self.group, start, count)

    def refit(self, weight: np.ndarray, start: int) -> None:
        made = stored_scale(block_scales(weight, self.name), self.scale_dtype, self.name)
        self.scale[:, start // self.group] = by_row(made, len(weight))[:, 0]

    def arrays(self) -> dict[str, np.ndarray]:
        return {"weight_scale": self.scale}


def fake_groups(x: np.ndarray, size: int = BLOCK) -> np.ndarray:
    """What a linear sees of float32 (..., in): e4m3 with one scale for each group of channels."""
    groups = x.reshape(-1, x.shape[-1] // size, size)
    scale = minifloat.row_scale(groups)
    return minifloat.dequantize_rows(minifloat.quantize_rows(groups, scale), scale).reshape(x.shape)
