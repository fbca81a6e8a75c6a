"""Making an int8 weight again from its source, to compare it with what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from ms_quant.algorithms.clip import RATIOS
from ms_quant.numerics import affine
from ms_quant.numerics.activation import Activation, PhasedActivation
from ms_quant.numerics.linear import QuantizedLinear, StaticActivation, int8_linear
from ms_quant.numerics.storage import DTYPES, round_up

PROBE_TOKENS, PROBE_STEPS = 64, 32.0


@dataclass(frozen=True)
class ScaleRule:
    """How a row's stored scale follows from the largest magnitude in it.

    Attributes:
        clipped: whether the algorithm searched clipping factors; else only 1 is one.
        dtype: what the weight scale is rounded up to before use.
        factor: what is stored is this times the weight scale.
        absmax: the largest magnitude of all rows where they share a scale, or None.
        step: of a static input whose product with the scale is what counts, or None. A format that
            stores the product alone does not tell which of a few neighbours the scale was.
    """

    clipped: bool
    dtype: np.dtype = DTYPES["float32"]
    factor: np.float32 = field(default_factory=lambda: np.float32(1))
    absmax: np.float32 | None = None
    step: np.float32 | None = None

    def find(self, weight: np.ndarray, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The weight scale of each row.

        Args:
            weight: float32 (out, in), what was rounded (smoothing applied).
            stored: float32 (out,), what the checkpoint holds.

        Returns:
            float32 (out,), the scale that is stored, without clipping where none of the search's
            gives it; and bool (out,), whether one did.
        """
        absmax = _absmax(weight)
        if self.absmax is not None:
            absmax = np.full_like(absmax, self.absmax)
        scales, good = self._scale(absmax, 1.0), np.zeros(len(weight), np.bool_)
        for ratio in RATIOS if self.clipped else RATIOS[:1]:
            scale = self._scale(absmax, ratio)
            same = ~good & self._gives(scale, stored)
            scales[same] = scale[same]
            good |= same
        return scales, good

    def _gives(self, scale: np.ndarray, stored: np.ndarray) -> np.ndarray:
        equal = self.factor * scale == stored
        return equal if self.step is None else equal | (self.step * scale == self.step * stored)

    def _scale(self, absmax: np.ndarray, ratio: float) -> np.ndarray:
        scale = affine.symmetric_scale(absmax * np.float32(ratio))
        return round_up(scale, self.dtype, "weight_scale").astype(np.float32)


def _absmax(weight: np.ndarray) -> np.ndarray:
    low, high = weight.min(axis=1, initial=0), weight.max(axis=1, initial=0)
    return np.maximum(-low, high)


@dataclass
class Comparison:
    """Differences of an int8 weight from the one made again, counted over pieces of rows.

    Attributes:
        rows: rows with a scale that cannot be theirs; ``row`` is the first: its index, what is
            stored and what would be without clipping.
        codes: int8 values that differ in the other rows; ``code`` is the first: row, column,
            what is stored and what was expected.
    """

    rows: int = 0
    codes: int = 0
    row: tuple[int, float, float] | None = None
    code: tuple[int, int, int, int] | None = None

    def add(self, start: int, weight: np.ndarray, linear: QuantizedLinear, rule: ScaleRule) -> None:
        """Compares some rows.

        Args:
            start: the first row's index.
            weight: float32 rows of the source, smoothing applied.
            linear: the same rows as stored; ``weight_scale`` is what the checkpoint holds.
            rule: how the stored scale follows from a row.
        """
        scales, good = rule.find(weight, linear.weight_scale)
        strange = np.flatnonzero(~good)
        if len(strange):
            first = strange[0]
            expected = float(rule.factor * scales[first])
            found = (start + int(first), float(linear.weight_scale[first]), expected)
            self.row, self.rows = self.row or found, self.rows + len(strange)
        codes = affine.quantize(weight, scales[:, None])
        wrong = (codes != linear.weight) & good[:, None]
        count = int(np.count_nonzero(wrong))
        if count and self.code is None:
            row, column = map(int, np.unravel_index(int(wrong.argmax()), wrong.shape))
            stored = int(linear.weight[row, column])
            self.code = (start + row, column, stored, int(codes[row, column]))
        self.codes += count

    def problems(self, path: str, suffix: str, shape: tuple[int, ...]) -> Iterator[str]:
        """One sentence for each kind of difference.

        Args:
            path: the linear.
            suffix: name of the tensor that stores the scales.
            shape: of the weight.
        """
        if self.row is not None:
            row, found, expected = self.row
            yield (
                f"{path}.{suffix}: {self.rows} of {shape[0]} rows do not follow from the source; "
                f"[{row}] is {found:.9g}, expected {expected:.9g} or a clipping factor of it"
            )
        if self.code is not None:
            row, column, stored, code = self.code
            yield (
                f"{path}.weight: {self.codes} of {shape[0] * shape[1]} values differ from those "
                f"of the source; [{row}, {column}] is {stored}, expected {code}"
            )


@dataclass
class OutputError:
    """Relative error of a quantized linear's output, on random inputs of the range it was made for.

    Inputs are normal with a standard deviation of 1, or with static activations, those of decode
    among them, of 32 quantization steps in every channel, cut to the range that the offset leaves;
    64 tokens, seed 0. The error is ||y - y_float|| / ||y_float||, without the bias.

    Args:
        activation: the linear's input.
        channels: its size.
    """

    activation: Activation
    channels: int
    inputs: np.ndarray = field(init=False)
    squares: float = 0.0
    norm: float = 0.0

    def __post_init__(self) -> None:
        x = np.random.default_rng(0).standard_normal((PROBE_TOKENS, self.channels), np.float32)
        static = self.activation
        if isinstance(static, PhasedActivation):
            static = static.static
        if isinstance(static, StaticActivation):
            offset = static.offset
            x = np.clip(x * np.float32(PROBE_STEPS), affine.QMIN - offset, affine.QMAX - offset)
            x *= static.input_scale
        self.inputs = x

    def add(self, linear: QuantizedLinear, weight: np.ndarray) -> None:
        """Takes in some rows of the linear, without bias, and of the float weight."""
        exact, found = self.inputs @ weight.T, linear.forward(self.inputs, decode=True)
        self.squares += float(np.sum(np.square(found - exact), dtype="f8"))
        self.norm += float(np.sum(np.square(exact), dtype="f8"))

    @property
    def value(self) -> float:
        return (self.squares / (self.norm or 1.0)) ** 0.5


def output_error(linear: QuantizedLinear, weight: np.ndarray) -> float:
    """The :class:`OutputError` of a whole linear.

    Args:
        linear: the quantized linear.
        weight: float32 (out, in), the source's.
    """
    error = OutputError(linear.activation, weight.shape[1])
    error.add(replace(linear, bias=None), weight)
    return error.value


def compare(
    linear: QuantizedLinear,
    smooth: np.ndarray | None,
    chunks: Iterable[tuple[int, np.ndarray]],
    rule: ScaleRule,
) -> tuple[Comparison, float]:
    """Compares an int8 linear with its source, some rows at a time.

    Args:
        linear: as stored; ``weight_scale`` is what the checkpoint holds.
        smooth: float32 (in,), what the weight's columns were multiplied by, or None.
        chunks: (first row, float32 rows) of the source's weight.
        rule: how the stored scale follows from a row.

    Returns:
        The differences, and the relative error of the output.
    """
    error = OutputError(linear.activation, linear.weight.shape[1])
    comparison = Comparison()
    for start, weight in chunks:
        rows = slice(start, start + len(weight))
        part = int8_linear(linear.weight[rows], linear.weight_scale[rows], None, linear.activation)
        error.add(part, weight)
        if smooth is not None:
            with np.errstate(over="ignore", under="ignore"):  # a forged scale; the rule refuses inf
                weight = weight * smooth
        comparison.add(start, weight, part, rule)
    return comparison, error.value
