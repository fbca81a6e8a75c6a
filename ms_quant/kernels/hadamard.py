"""Fast Walsh-Hadamard transforms, natively where they can be; float64 in and out."""

from __future__ import annotations

import numpy as np

from ms_quant.kernels.native import available, call
from ms_quant.numerics import rotation


def sylvester(x: np.ndarray, divisor: float) -> np.ndarray:
    """As :func:`ms_quant.numerics.rotation.sylvester`, bit for bit; ``x`` may change."""
    if not available():
        return rotation.sylvester(x, divisor)
    y = np.ascontiguousarray(x, np.float64)
    call("msq_hadamard", y.ctypes.data, *y.shape, divisor)
    return y
