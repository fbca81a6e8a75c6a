"""What another command puts around the algorithms of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ms_quant.algorithms.problem import Problem, Solution
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.statistics.observers import ActivationStats

WeightTransform = Callable[[str, np.ndarray, ActivationStats | None], np.ndarray]
"""Called with a linear's full path, its float32 weight and its input's statistics."""

Rounding = Callable[[Problem, Solution], tuple[dict[str, QuantizedLinear], dict[str, Any]]]
"""Makes the linears of a group, and notes about them for the report. It sees the Hessian."""


@dataclass(frozen=True)
class BlockHooks:
    """What another command puts around the algorithms.

    Attributes:
        transform: changes a weight before it is quantized (pruning).
        rounding: what makes int8 linears of the algorithm's answer; None rounds to nearest.
    """

    transform: WeightTransform | None = None
    rounding: Rounding | None = None


NO_HOOKS = BlockHooks()
