"""What a linear with parameters of timesteps stores for all of them."""

from __future__ import annotations

import numpy as np

from ms_quant.numerics.linear import QuantizedLinear, folded_bias
from ms_quant.numerics.timestep import TimestepActivation


def timestep_tables(linear: QuantizedLinear, path: str) -> tuple[np.ndarray, np.ndarray]:
    """``deq_scale`` float32 (T, n) and ``quant_bias`` int32 (T, n) of a linear with parameters of
    timesteps, the bias in it; zeros for steps without any. Those of a file are as it states them.

    Raises:
        MsQuantError: a sum does not fit int32.
    """
    assert isinstance(linear.activation, TimestepActivation)
    if linear.activation.stated is not None:
        return linear.activation.stated.deq_scale, linear.activation.stated.quant_bias
    scale = linear.activation.scale
    bias = np.zeros((len(scale), len(linear.weight)), np.int32)
    for t in np.flatnonzero(scale):
        bias[t] = folded_bias(linear.at_step(t), f"{path}, timestep {t}")
    return scale[:, None] * linear.weight_scale, bias
