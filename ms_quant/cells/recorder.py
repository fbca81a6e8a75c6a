"""A Cell that shows its input to a function and passes it on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from mindspore import Tensor, nn


class Recorder(nn.Cell):
    """Wraps a Cell during calibration, in PyNative.

    Args:
        cell: the Cell that does the work.
        observe: called with each input.
    """

    def __init__(self, cell: nn.Cell, observe: Callable[[Tensor], None]):
        super().__init__()
        self.forward = cell.__call__  # as a Cell of this one its parameters would be renamed
        self.observe = observe

    def construct(self, x: Tensor) -> Tensor:
        self.observe(x)
        return self.forward(x)


def float32(x: Tensor) -> np.ndarray:
    """A tensor's values, as statistics take them."""
    return x.asnumpy().astype(np.float32, copy=False)
