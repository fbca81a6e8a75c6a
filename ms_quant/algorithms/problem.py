"""What an algorithm is given, and what it answers.

An algorithm is a function ``solve(problem) -> Solution``. It ends as numbers in the scheme's
tensors: a smoothing vector and a clipping factor for each row. :func:`apply` turns them into
int8 linears, in one place for every algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ms_quant.numerics.linear import (
    QuantizedLinear,
    StaticActivation,
    quantize_linear,
    static_activation,
)
from ms_quant.numerics.storage import weight_scale_dtype
from ms_quant.observers import ActivationStats
from ms_quant.spec import Scheme


@dataclass(frozen=True)
class Solution:
    """Attributes:
    smooth: float32 (in,), what the input is divided by; None for no smoothing.
    clip: linear name to float32 (out, 1), the factor on each row's range; missing means 1.
    note: what was chosen, for the report.
    """

    smooth: np.ndarray | None = None
    clip: Mapping[str, np.ndarray] = field(default_factory=dict)
    note: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Linears that read the same input, to be quantized together.

    Attributes:
        name: the group's name, for errors.
        scheme: the scheme to reach.
        weights: linear name to float32 (out, in).
        biases: linear name to float32 (out,), where there is one.
        stats: statistics of the shared input, None when the scheme needs none.
        dtype: type that scales in the model's type are stored in.
        loss: error of the network with the linears of a candidate in place of the float ones;
            a mean squared error over calibration tokens.
        alpha: smoothing strength where the algorithm takes one.
        damage: squared error over squared output of each token, in the mean over tokens; a token
            with huge activations counts as any other. None where no block is run.
    """

    name: str
    scheme: Scheme
    weights: Mapping[str, np.ndarray]
    biases: Mapping[str, np.ndarray]
    stats: ActivationStats | None
    dtype: np.dtype
    loss: Callable[[Mapping[str, QuantizedLinear]], float]
    alpha: float = 0.5
    damage: Callable[[Mapping[str, QuantizedLinear]], float] | None = None


def input_quantization(problem: Problem, solution: Solution) -> StaticActivation:
    """How the shared input is quantized, where that is static."""
    assert problem.stats is not None
    return static_activation(
        problem.stats.low, problem.stats.high, solution.smooth, problem.dtype, problem.name
    )


def apply(problem: Problem, solution: Solution) -> dict[str, QuantizedLinear]:
    """The int8 linears that a solution stands for, rounded to nearest."""
    activation, scale_dtype = None, weight_scale_dtype(problem.dtype)
    if not problem.scheme.activation.dynamic:
        activation = input_quantization(problem, solution)
        scale_dtype = np.dtype(np.float32)  # only deq_scale is stored, in float32
    return {
        name: quantize_linear(
            weight, problem.biases.get(name), activation, scale_dtype, solution.clip.get(name, 1.0)
        )
        for name, weight in problem.weights.items()
    }
