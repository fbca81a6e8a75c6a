"""What a job keeps of a finished block."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from ms_quant.numerics.linear import QuantizedLinear


class Measured(NamedTuple):
    """What is known of a group besides its numbers; no output holds it.

    Attributes:
        seconds: what its smoothing and rounding took.
        error: the relative error of its outputs; None without calibration.
    """

    seconds: float
    error: float | None = None


class FinishedBlock(Protocol):
    """Attributes:
    linears: path to quantized linear.
    floats: float32 tensors that folding has changed, by name.
    notes: group to what was chosen.
    cache: path to float32 scales of a linear's outputs in a cache of int8.
    ranges: how large activations get.
    seconds: group to what it took.
    errors: group to the relative error of its outputs.
    routing: how many tokens came to its experts; empty where it has none.
    inputs: group to how large its input is before and after smoothing.
    """

    linears: dict[str, QuantizedLinear]
    floats: dict[str, np.ndarray]
    notes: dict[str, dict[str, Any]]
    cache: dict[str, np.ndarray]
    ranges: dict[str, Any]
    seconds: dict[str, float]
    errors: dict[str, float]
    routing: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
