"""Rate-distortion rounding as steps of the block-by-block driver: first measure, then choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ms_quant.algorithms.problem import Problem, Solution, apply, input_quantization
from ms_quant.numerics.linear import QuantizedLinear, StaticActivation, int8_linear
from ms_quant.quantization.hooks import Rounding
from sparse_compress.codec import encoded_size
from sparse_compress.codec.fractal import TILE_ROWS, tile_count
from sparse_compress.rate.dictionary import Floats
from sparse_compress.rate.rounding import (
    Rounded,
    curvature,
    output_power,
    relative_error,
    round_matrix,
)
from sparse_compress.rate.share import PRICES

SAMPLE_ROWS = 2 * TILE_ROWS
MEASURING_PASSES = 1
COARSE = 7
INDEX_RECORD = 8
LEAST_SENSITIVITY = 1e-6


class Subject(NamedTuple):
    """Linears that read one input, as one matrix.

    Attributes:
        weight: float32 (out, in), smoothed.
        hessian: float32 (in, in), of the smoothed input.
        activation: how the input is quantized.
    """

    weight: Floats
    hessian: Floats
    activation: StaticActivation

    def split(self, problem: Problem, rounded: Rounded) -> dict[str, QuantizedLinear]:
        """The linears that the rows of a rounded matrix are."""
        linears, start = {}, 0
        for name, weight in problem.weights.items():
            rows = slice(start, start + len(weight))
            start = rows.stop
            bias = problem.biases.get(name)
            linears[name] = int8_linear(
                rounded.codes[rows], rounded.scale[rows], bias, self.activation
            )
        return linears


def make_subject(problem: Problem, solution: Solution) -> Subject:
    """The matrix of a problem, as the algorithm has smoothed it."""
    assert problem.stats is not None
    activation = input_quantization(problem, solution)
    assert isinstance(activation, StaticActivation)
    smooth = activation.smooth
    weight = np.concatenate([weight * smooth for weight in problem.weights.values()])
    hessian = problem.stats.hessian
    hessian /= smooth
    hessian /= smooth[:, None]
    return Subject(weight, hessian, activation)


def measure(problem: Problem, solution: Solution) -> tuple[dict[str, QuantizedLinear], dict]:
    """No linears, and a note: the curve of :class:`~sparse_compress.rate.share.Curve`."""
    subject = make_subject(problem, solution)
    weight, hessian = subject.weight, subject.hessian
    count = min(SAMPLE_ROWS, len(weight))
    part = weight[np.arange(count) * len(weight) // max(1, count)]
    curved, power = curvature(hessian), output_power(part, hessian)
    errors, ratios = [], []
    for price in PRICES:
        rounded = round_matrix(part, curved, _unit(price, power, part), MEASURING_PASSES)
        errors.append(relative_error(part, hessian, rounded))
        stored = encoded_size(rounded.codes) + INDEX_RECORD * tile_count(*part.shape)
        ratios.append(stored / part.size)
    note = {
        "weights": weight.size,
        "sensitivity": sensitivity(problem, solution, subject),
        "errors": errors,
        "ratios": ratios,
    }
    return {}, note


def _unit(price: float, power: float, weight: Floats) -> float:
    """A price in relative error for a bit per weight, in squared output for a bit."""
    return max(price * power / weight.size, float(np.finfo(np.float32).tiny))


def sensitivity(problem: Problem, solution: Solution, subject: Subject) -> float:
    """Relative error of the block's output for a relative error of the linears' output.

    From the linears at 4 bits, against the same at 8 bits, so that what the quantized input does
    is left out.
    """
    absmax = np.abs(subject.weight).max(axis=1)
    scale = (np.where(absmax > 0, absmax, 1) / COARSE).astype(np.float32)
    codes = np.rint(subject.weight / scale[:, None]).astype(np.int8)
    coarse = Rounded(codes, scale)
    error = relative_error(subject.weight, subject.hessian, coarse)
    if not error > 0:
        return 1.0
    assert problem.relative_mse is not None
    before, after = apply(problem, solution), subject.split(problem, coarse)
    return max(
        (problem.relative_mse(after) - problem.relative_mse(before)) / error, LEAST_SENSITIVITY
    )


def choosing(prices: Mapping[str, float]) -> Rounding:
    """The rounding for given prices.

    Args:
        prices: group's fused path to its price of a bit per weight, in relative error.
    """

    def rounding(
        problem: Problem, solution: Solution
    ) -> tuple[dict[str, QuantizedLinear], dict[str, Any]]:
        subject, price = make_subject(problem, solution), prices[problem.name]
        weight, hessian = subject.weight, subject.hessian
        unit = _unit(price, output_power(weight, hessian), weight)
        rounded = round_matrix(weight, curvature(hessian), unit)
        error = relative_error(weight, hessian, rounded)
        return subject.split(problem, rounded), {"price": price, "relative_error": error}

    return rounding
