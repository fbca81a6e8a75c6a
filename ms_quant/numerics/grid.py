"""How a weight becomes codes: a format is fitted to a weight, which gives a grid to round to.

A **format** is what a scheme says of a weight: bits, group, element type, rule. Fitted to a weight
it gives a **grid**: the parameters (scales, zero points, exponents) with which codes are read. On a
grid every element is rounded alone, so rounding to nearest, GPTQ's column step, clip and scale
searches use the same two functions: ``round`` and ``values``.

================  ======================  ==========================================  ==========
format            codes                   a code q stands for                         group
================  ======================  ==========================================  ==========
AffineFormat      int8, of 8 or 4 bits    (q - zero_point) * scale                    G or K
TwoLevelFormat    int8, of 4 bits         (q * second) * scale                        G
Float8Format      uint8, E4M3             e4m3(q) * scale                             K
Float8BlockFormat uint8, E4M3             e4m3(q) * scale, one for 128 rows as well   128
MxFormat          uint8, E4M3 or E2M1     element(q) * 2**e                           32
DualMxFormat      uint8, E2M1             (e2m1(q) * 2**e) * dual_scale               32
FloatFormat       float32                 itself, a float of the model's type         K
================  ======================  ==========================================  ==========

``group`` is the number of adjacent inputs that share parameters of their own; K is per-channel.
Scales are rounded up to the type in which they are stored before they are used, so what is stored
is what rounding has seen.

Source: the rules of the modules named in each class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.numerics import affine, groupwise, w4a8
from ms_quant.numerics.storage import DTYPES, round_up

FLOAT32 = DTYPES["float32"]
Clip = np.ndarray | float


class Grid(Protocol):
    """The parameters that codes are read with.

    Columns are the inputs of a linear. ``start`` is the index of the first column that is given,
    for callers that have only some.
    """

    @property
    def group(self) -> int:
        """How many adjacent columns share parameters of their own."""

    def round(self, weight: np.ndarray, start: int = 0) -> np.ndarray:
        """Codes (out, n) of float32 (out, n) columns."""

    def values(self, codes: np.ndarray, start: int = 0) -> np.ndarray:
        """The float32 (out, n) that codes stand for."""

    def refit(self, weight: np.ndarray, start: int) -> None:
        """Takes the parameters of the one group that begins at ``start`` from its columns."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters by name; the format's ``grid`` reads them back."""


class WeightFormat(Protocol):
    """What a scheme says of a weight."""

    @property
    def bits(self) -> int:
        """Of a code: 16, 8 or 4."""

    @property
    def integer(self) -> bool:
        """Whether codes are integers; else they are floats."""

    @property
    def group_size(self) -> int:
        """How many adjacent inputs share parameters of their own; 0 for all."""

    @property
    def clips(self) -> bool:
        """Whether a smaller range than the weight's own makes sense."""

    def fit(
        self, weight: np.ndarray, name: str, scale_dtype: np.dtype = FLOAT32, clip: Clip = 1.0
    ) -> Grid:
        """A grid for a weight.

        Args:
            weight: float32 (out, in), finite.
            name: the tensor's name, for errors.
            scale_dtype: type in which scales are stored.
            clip: factor on each group's range, (out, in / group), (out, 1) or a number.
        """

    def grid(self, arrays: Mapping[str, np.ndarray]) -> Grid:
        """The grid of stored parameters."""

    def check_columns(self, columns: int, name: str) -> None:
        """Refuses a linear with a number of inputs that groups do not divide."""


def columns_of(parameters: np.ndarray, size: int, start: int, count: int) -> np.ndarray:
    """The parameters of each of ``count`` columns, (out, count) or, per channel, (out, 1)."""
    if parameters.shape[1] == 1:
        return parameters
    return parameters[:, np.arange(start, start + count) // size]


def stored_scale(scale: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    return round_up(scale, dtype, f"{name}_scale").astype(np.float32)


def check_group(group: int, columns: int, name: str) -> None:
    if group and columns % group:
        raise BadArgumentError(f"{name}: groups of {group} do not divide K = {columns}")


@dataclass(frozen=True)
class AffineFormat:
    """int8 or int4, per channel or per group: :mod:`ms_quant.numerics.groupwise`.

    Attributes:
        bits: 8 or 4.
        group_size: G, or 0 for per-channel.
        symmetric: absmax / 127 or / 7, else (max - min) / 255 or / 15 and a zero point.
        per_tensor: whether all rows have the same scale; for symmetric weights without groups.
    """

    bits: int = 8
    group_size: int = 0
    symmetric: bool = True
    per_tensor: bool = False
    clips = True
    integer = True

    def check_columns(self, columns: int, name: str) -> None:
        check_group(self.group_size, columns, name)

    def fit(
        self, weight: np.ndarray, name: str, scale_dtype: np.dtype = FLOAT32, clip: Clip = 1.0
    ) -> AffineGrid:
        self.check_columns(weight.shape[1], name)
        size = self.group_size or weight.shape[1]
        grid = AffineGrid(np.empty(0), np.empty(0, np.int8), self, size, scale_dtype, name)
        grid.scale, grid.zero_point = grid.parameters(weight, clip)
        return grid

    def grid(self, arrays: Mapping[str, np.ndarray]) -> AffineGrid:
        scale = arrays["weight_scale"]
        zeros = np.broadcast_to(np.int8(0), scale.shape)
        return AffineGrid(scale, arrays.get("weight_zero_point", zeros), self, self.group_size)


@dataclass
class AffineGrid:
    """Scales and zero points.

    Attributes:
        scale: float32 (out, in / group).
        zero_point: int8 of that shape; zeros when symmetric.
        format: what was fitted.
        group: columns of a group.
        scale_dtype, name: as given to ``fit``.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    format: AffineFormat = field(default_factory=AffineFormat)
    group: int = 0
    scale_dtype: np.dtype = FLOAT32
    name: str = "weight"

    def parameters(self, weight: np.ndarray, clip: Clip = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point of each whole group of a weight."""
        rows, columns = weight.shape
        size = self.group or columns
        groups = groupwise.finite(weight, self.name).reshape(
            rows, columns // size if size else 1, size
        )
        factor, bits = np.float32(1) * clip, self.format.bits
        smallest, largest = affine.LIMITS[bits]
        low = groups.min(axis=2, initial=0) * factor
        high = groups.max(axis=2, initial=0) * factor
        if self.format.symmetric:
            absmax = np.maximum(-low, high)
            if self.format.per_tensor:
                absmax = np.full_like(absmax, absmax.max(initial=0))
            scale = affine.symmetric_scale(absmax, largest)
            scale = stored_scale(scale, self.scale_dtype, self.name)
            return scale, np.zeros(scale.shape, np.int8)
        scale = stored_scale(
            affine.asymmetric_parameters(low, high, bits)[0], self.scale_dtype, self.name
        )
        zero_point = np.rint(smallest - low.astype(np.float64) / scale)
        return scale, np.clip(zero_point, smallest, largest).astype(np.int8)

    def round(self, weight: np.ndarray, start: int = 0) -> np.ndarray:
        if self._is_whole(weight):  # without a scale for every element
            return groupwise.quantize(weight, self._by, self.name)
        scale, zero_point = self._at(start, weight.shape[1])
        return affine.quantize(weight, scale, zero_point, self.format.bits)

    def values(self, codes: np.ndarray, start: int = 0) -> np.ndarray:
        if self._is_whole(codes):
            return groupwise.dequantize(codes, self._by, self.name)
        return affine.dequantize(codes, *self._at(start, codes.shape[1]))

    @property
    def _by(self) -> groupwise.Parameters:
        return groupwise.Parameters(self.scale, self.zero_point, self.format.bits)

    def _is_whole(self, columns: np.ndarray) -> bool:
        return self.group * self.scale.shape[1] == columns.shape[1]

    def _at(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        return (
            columns_of(self.scale, self.group, start, count),
            columns_of(self.zero_point, self.group, start, count),
        )

    def refit(self, weight: np.ndarray, start: int) -> None:
        index = slice(start // self.group, start // self.group + 1)
        self.scale[:, index], self.zero_point[:, index] = self.parameters(weight)

    def arrays(self) -> dict[str, np.ndarray]:
        if self.format.symmetric:
            return {"weight_scale": self.scale}
        return {"weight_scale": self.scale, "weight_zero_point": self.zero_point}


@dataclass(frozen=True)
class TwoLevelFormat:
    """int4 in groups of an int8 weight: :mod:`ms_quant.numerics.w4a8`.

    Attributes:
        group_size: G of the second level; 256 is usual.
    """

    group_size: int = 256
    bits = 4
    symmetric = True
    clips = True
    integer = True

    def check_columns(self, columns: int, name: str) -> None:
        check_group(self.group_size, columns, name)

    def fit(
        self, weight: np.ndarray, name: str, scale_dtype: np.dtype = FLOAT32, clip: Clip = 1.0
    ) -> TwoLevelGrid:
        self.check_columns(weight.shape[1], name)
        weight = groupwise.finite(weight, name)
        absmax = np.abs(weight).max(axis=1, keepdims=True, initial=0)
        scale = stored_scale(affine.symmetric_scale(absmax, w4a8.PROTECTED), scale_dtype, name)
        between = affine.quantize(weight, scale).astype(np.float32)
        second = AffineFormat(4, self.group_size).fit(between, f"{name}_second", scale_dtype, clip)
        return TwoLevelGrid(scale, second)

    def grid(self, arrays: Mapping[str, np.ndarray]) -> TwoLevelGrid:
        second = AffineFormat(4, self.group_size).grid(
            {"weight_scale": arrays["weight_scale_second"]}
        )
        return TwoLevelGrid(arrays["weight_scale"], second)


@dataclass
class TwoLevelGrid:
    """Attributes:
    scale: float32 (out, 1), of the int8 weight in between.
    second: the grid of the int4 codes of that.
    """

    scale: np.ndarray
    second: AffineGrid

    @property
    def group(self) -> int:
        return self.second.group

    def round(self, weight: np.ndarray, start: int = 0) -> np.ndarray:
        return self.second.round(affine.quantize(weight, self.scale).astype(np.float32), start)

    def values(self, codes: np.ndarray, start: int = 0) -> np.ndarray:
        return self.second.values(codes, start) * self.scale

    def refit(self, weight: np.ndarray, start: int) -> None:
        self.second.refit(affine.quantize(weight, self.scale).astype(np.float32), start)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"weight_scale": self.scale, "weight_scale_second": self.second.scale}
