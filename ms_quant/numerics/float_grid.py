"""Formats and grids of floats: float8 rows, microscaling blocks, blocks under a second scale, and
the model's own type.

Their protocol and the table of all of them: :mod:`ms_quant.numerics.grid`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ms_quant.numerics import minifloat, mx
from ms_quant.numerics.affine import check_finite
from ms_quant.numerics.grid import FLOAT32, Clip, check_group, columns_of, stored_scale
from ms_quant.numerics.minifloat import E2M1
from ms_quant.numerics.mx_rules import HUGE, RULES, MxRule


@dataclass(frozen=True)
class Float8Format:
    """E4M3 with one scale a row: :mod:`ms_quant.numerics.minifloat`."""

    group_size = 0
    bits = 8
    symmetric = True
    clips = False
    integer = False

    def check_columns(self, columns: int, name: str) -> None:
        """Any number will do."""

    def fit(
        self, weight: np.ndarray, name: str, scale_dtype: np.dtype = FLOAT32, clip: Clip = 1.0
    ) -> Float8Grid:
        scale = stored_scale(minifloat.row_scale(weight, name), scale_dtype, name)
        return Float8Grid(scale, scale_dtype, name, weight.shape[1])

    def grid(self, arrays: Mapping[str, np.ndarray]) -> Float8Grid:
        return Float8Grid(arrays["weight_scale"])


@dataclass
class Float8Grid:
    """Attributes:
    scale: float32 (out, 1).
    scale_dtype, name: as given to ``fit``.
    group: K.
    """

    scale: np.ndarray
    scale_dtype: np.dtype = FLOAT32
    name: str = "weight"
    group: int = 0

    def round(self, weight: np.ndarray, start: int = 0) -> np.ndarray:
        return minifloat.quantize_rows(weight, self.scale, self.name)

    def values(self, codes: np.ndarray, start: int = 0) -> np.ndarray:
        return minifloat.dequantize_rows(codes, self.scale, self.name)

    def refit(self, weight: np.ndarray, start: int) -> None:
        self.scale = stored_scale(
            minifloat.row_scale(weight, self.name), self.scale_dtype, self.name
        )

    def arrays(self) -> dict[str, np.ndarray]:
        return {"weight_scale": self.scale}


@dataclass(frozen=True)
class MxFormat:
    """MXFP8 or MXFP4: :mod:`ms_quant.numerics.mx`.

    Attributes:
        rule: a name from ``mx_rules.RULES``.
        multiple: what K must be a multiple of; a short last block is fine, but two E2M1 codes are
            packed to a byte, and some runtimes read exponents in pairs.
    """

    rule: str
    multiple: int = 1
    group_size = mx.BLOCK
    symmetric = True
    clips = False
    integer = False

    @property
    def bits(self) -> int:
        return 4 if self.mx_rule.element is E2M1 else 8

    @property
    def mx_rule(self) -> MxRule:
        return RULES[self.rule]

    def check_columns(self, columns: int, name: str) -> None:
        check_group(self.multiple, columns, name)

    def fit(
        self, weight: np.ndarray, name: str, scale_dtype: np.dtype = FLOAT32, clip: Clip = 1.0
    ) -> MxGrid:
        blocks = mx.in_blocks(minifloat.finite_float32(weight, name), mx.BLOCK)
        return MxGrid(mx.shared_exponents(blocks, self.mx_rule), self.mx_rule, name)

    def grid(self, arrays: Mapping[str, np.ndarray]) -> MxGrid:
        return MxGrid(arrays["weight_exponent"], self.mx_rule)


@dataclass
class MxGrid:
    """Attributes:
    exponents: uint8 (out, ceil(in / 32)), E8M0.
    rule: how elements are rounded.
    name: the tensor's name, for errors.
    """

    exponents: np.ndarray
    rule: MxRule
    name: str = "weight"
    group = mx.BLOCK

    def round(self, weight: np.ndarray, start: int = 0) -> np.ndarray:
        steps = _ldexp(weight, -self._at(start, weight.shape[1]))
        return minifloat.encode(steps, self.rule.element, self.rule.rounding, self.name)

    def values(self, codes: np.ndarray, start: int = 0) -> np.ndarray:
        elements = minifloat.decode(codes, self.rule.element, self.name)
        return _ldexp(elements, self._at(start, codes.shape[1]))

    def _at(self, start: int, count: int) -> np.ndarray:
        index = np.arange(start, start + count) // self.group
        return mx.decode_exponent(self.exponents, self.name)[:, index]

    def refit(self, weight: np.ndarray, start: int) -> None:
        blocks = mx.in_blocks(weight, self.group)
        self.exponents[:, start // self.group] = mx.shared_exponents(blocks, self.rule)[:, 0]

    def arrays(self) -> dict[str, np.ndarray]:
        return {"weight_exponent": self.exponents}


def _ldexp(x: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return np.clip(np.ldexp(x, exponent), -HUGE, HUGE)


@dataclass(frozen=True)
class DualMxFormat:
    """MXFP4 under a float32 scale for each long block: :mod:`ms_quant.numerics.mx`.

    Attributes:
        rule: a name from ``mx_rules.RULES``, of MXFP4.
        dual_block_size: D, the length of a long block, a multiple of 32; mindie-sd reads 512.
    """

    rule: str
    dual_block_size: int = mx.DUAL_BLOCK
    group_size = mx.BLOCK
    bits = 4
    symmetric = True
    clips = False
    integer = False

    def check_columns(self, columns: int, name: str) -> None:
        check_group(2, columns, name)

    def fit(
        self, weight: np.ndarray, name: str, scale_dtype: np.dtype = FLOAT32, clip: Clip = 1.0
    ) -> DualMxGrid:
        values = minifloat.finite_float32(weight, name)
        scales = mx.dual_scales(values, self.dual_block_size)[..., 0]
        steps = values / columns_of(scales, self.dual_block_size, 0, values.shape[1])
        return DualMxGrid(scales, self.dual_block_size, MxFormat(self.rule).fit(steps, name))

    def grid(self, arrays: Mapping[str, np.ndarray]) -> DualMxGrid:
        inner = MxFormat(self.rule).grid(arrays)
        return DualMxGrid(arrays["weight_dual_scale"], self.dual_block_size, inner)


@dataclass
class DualMxGrid:
    """Attributes:
    scales: float32 (out, ceil(in / size)).
    size: columns of a long block.
    inner: the grid of what is left after dividing by them.
    """

    scales: np.ndarray
    size: int
    inner: MxGrid
    group = mx.BLOCK

    def round(self, weight: np.ndarray, start: int = 0) -> np.ndarray:
        steps = weight / columns_of(self.scales, self.size, start, weight.shape[1])
        return self.inner.round(steps, start)

    def values(self, codes: np.ndarray, start: int = 0) -> np.ndarray:
        scales = columns_of(self.scales, self.size, start, codes.shape[1])
        return self.inner.values(codes, start) * scales

    def refit(self, weight: np.ndarray, start: int) -> None:
        self.inner.refit(weight / columns_of(self.scales, self.size, start, weight.shape[1]), start)

    def arrays(self) -> dict[str, np.ndarray]:
        return {**self.inner.arrays(), "weight_dual_scale": self.scales}


@dataclass(frozen=True)
class FloatFormat:
    """Floats of the model's type, which are their own codes: what an algorithm does to them is all.

    Codes are held in float32.
    """

    group_size = 0
    bits = 16
    symmetric = True
    clips = False
    integer = False

    def check_columns(self, columns: int, name: str) -> None:
        """Any number will do."""

    def fit(
        self, weight: np.ndarray, name: str, scale_dtype: np.dtype = FLOAT32, clip: Clip = 1.0
    ) -> FloatGrid:
        return FloatGrid(scale_dtype, name, weight.shape[1])

    def grid(self, arrays: Mapping[str, np.ndarray]) -> FloatGrid:
        return FloatGrid()


@dataclass
class FloatGrid:
    """Attributes:
    dtype: the model's.
    name: as given to ``fit``.
    group: K.
    """

    dtype: np.dtype = FLOAT32
    name: str = "weight"
    group: int = 0

    def round(self, weight: np.ndarray, start: int = 0) -> np.ndarray:
        with np.errstate(over="ignore"):
            codes = weight.astype(self.dtype).astype(np.float32)
        check_finite(codes, f"{self.name} in {self.dtype.name}")
        return codes

    def values(self, codes: np.ndarray, start: int = 0) -> np.ndarray:
        return codes

    def refit(self, weight: np.ndarray, start: int) -> None:
        """There is nothing to take."""

    def arrays(self) -> dict[str, np.ndarray]:
        return {}
