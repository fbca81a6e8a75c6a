"""Making a weight on any grid again from its source: parameters by the format, codes by rounding.

:mod:`ms_quant.verify.requantize` does the same for int8 with a scale a row, whose product with an
input scale may be all that is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ms_quant.algorithms.clip import RATIOS
from ms_quant.numerics.grid import Grid, WeightFormat
from ms_quant.numerics.linear import LowRank, QuantizedLinear, Stated, bias_units


def some_rows(linear: QuantizedLinear, format: WeightFormat, rows: slice) -> QuantizedLinear:
    """The part of a linear that gives some of its outputs, without the bias.

    Args:
        linear: the whole.
        format: of its weight.
        rows: which outputs.
    """
    branch = linear.branch
    return replace(
        linear,
        weight=linear.weight[rows],
        grid=format.grid({name: array[rows] for name, array in linear.grid.arrays().items()}),
        bias=None,
        branch=branch and LowRank(branch.l1, branch.l2[rows]),
        stated=_without_bias(linear, rows),
    )


def _without_bias(linear: QuantizedLinear, rows: slice) -> Stated | None:
    """What is stated of some outputs, less the bias that is in it."""
    if linear.stated is None or linear.bias is None or not linear.stated.folds_bias:
        return linear.stated and linear.stated.rows(rows)
    found = linear.stated.rows(rows)
    units = bias_units(linear.bias[rows], found.deq_scale)
    return replace(found, quant_bias=(found.quant_bias - units).astype(np.int32))


@dataclass
class GridComparison:
    """Differences of a weight from the one made again, counted over pieces of rows.

    Args:
        format: of the weight.
        dtype: in which its scales are stored.
        clipped: whether the algorithm searched factors on the groups' ranges.

    Attributes:
        rows: rows with parameters that cannot be theirs; ``row`` is the first.
        codes: codes that differ in the other rows; ``code`` is the first: row, column, what is
            stored and what was expected.
    """

    format: WeightFormat
    dtype: np.dtype
    clipped: bool
    rows: int = 0
    codes: int = 0
    row: int | None = None
    code: tuple[int, int, int, int] | None = None

    def add(self, start: int, weight: np.ndarray, linear: QuantizedLinear) -> None:
        """Compares some rows.

        Args:
            start: the first row's index.
            weight: float32 rows of the source, smoothing applied.
            linear: the same rows as stored.
        """
        good = self._follows(weight, linear.grid)
        strange = np.flatnonzero(~good)
        if len(strange):
            self.row = start + int(strange[0]) if self.row is None else self.row
            self.rows += len(strange)
        codes = linear.grid.round(weight)
        wrong = (codes != linear.weight) & good[:, None]
        count = int(np.count_nonzero(wrong))
        if count and self.code is None:
            row, column = map(int, np.unravel_index(int(wrong.argmax()), wrong.shape))
            stored, expected = int(linear.weight[row, column]), int(codes[row, column])
            self.code = (start + row, column, stored, expected)
        self.codes += count

    def _follows(self, weight: np.ndarray, grid: Grid) -> np.ndarray:
        """bool (out,): whether all parameters of a row are what its format makes of it."""
        stored, follows = grid.arrays(), np.zeros((len(weight), 1), np.bool_)
        for ratio in RATIOS if self.clipped else RATIOS[:1]:
            made = self.format.fit(weight, "weight", self.dtype, ratio).arrays()
            same = np.ones((len(weight), 1), np.bool_)
            for name, array in made.items():
                equal = array == stored[name]
                same = same & (equal if self.format.clips else equal.all(axis=1, keepdims=True))
            follows = follows | same
        return follows.all(axis=1)

    def problems(self, path: str, shape: tuple[int, ...]) -> Iterator[str]:
        """One sentence for each kind of difference.

        Args:
            path: the linear.
            shape: of the weight.
        """
        if self.row is not None:
            yield (
                f"{path}.weight_scale: parameters of {self.rows} of {shape[0]} rows do not follow "
                f"from the source; the first is row {self.row}"
            )
        if self.code is not None:
            row, column, stored, code = self.code
            yield (
                f"{path}.weight: {self.codes} of {shape[0] * shape[1]} codes differ from those "
                f"of the source; [{row}, {column}] is {stored}, expected {code}"
            )
