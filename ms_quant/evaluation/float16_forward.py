"""A checkpoint computed as a runtime does that has float16 alone, such as on the Atlas 300I Duo.

Every tensor between two operators is rounded to float16: norms, projections, attention's output,
the gated product and the residual stream. Inside an operator sums are float32. Rotary embedding and
attention are one operator, and logits stay float32. What is too large for float16 is an error here:
such a runtime would go on with infinity, then NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from ms_quant import kernels
from ms_quant.budget import Budget
from ms_quant.errors import BadArgumentError, UnsupportedError
from ms_quant.formats.opening import ServedModel
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.statistics.activation_range import LARGEST, Extreme

FLOAT16 = np.dtype(np.float16)


def to_float16(x: np.ndarray) -> np.ndarray:
    """float32 values rounded to float16, half to even; too large ones are infinite."""
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(FLOAT16).astype(np.float32)


class Float16OverflowError(UnsupportedError):
    """An activation does not fit float16."""


class Float16Block(BlockForward):
    """One decoder layer of a checkpoint.

    Raises:
        Float16OverflowError: an activation is too large; names block, place, channel and value.
    """

    @classmethod
    def of(cls, model: ServedModel, index: int, budget: Budget) -> Float16Block:
        """A block of a checkpoint with its parameters in float16."""

        def read(name: str) -> np.ndarray:
            return to_float16(model.tensor(name))

        return cls.load(model.config, index, read, model.linear, budget)

    def between(self, place: str, x: np.ndarray) -> np.ndarray:
        rounded = to_float16(x)
        if np.isfinite(rounded).all():
            return rounded
        rows = np.abs(x.reshape(-1, x.shape[-1])).max(axis=0)
        channel = int(rows.argmax())
        found = Extreme(self.index, place, float(rows[channel]), channel)
        raise Float16OverflowError(
            f"{found}, expected at most {LARGEST:,.0f}, what float16 holds: a float16 runtime "
            "would compute inf, then NaN"
        )


class Float16Forward:
    """The parts of a checkpoint that perplexity runs, in float16."""

    def __init__(self, model: ServedModel, length: int, budget: Budget):
        if any(model.cache_scales(index) for index in range(model.config.num_layers)):
            raise BadArgumentError(
                "--float16 computes keys and values in float16, expected a checkpoint without C8"
            )
        self.model, self.budget = model, budget
        self.positions = Positions(model.config, length)
        self.gain = to_float16(model.tensor("model.norm.weight"))

    def block(self, index: int) -> Callable[[np.ndarray], np.ndarray]:
        """The output of a block, float32 (B, S, hidden) of the same."""
        return partial(Float16Block.of(self.model, index, self.budget), at=self.positions)

    def norm(self, x: np.ndarray) -> np.ndarray:
        """The last norm, float32 (B, S, hidden) of the same."""
        return to_float16(kernels.rms_norm(x, self.gain, self.model.config.rms_norm_eps))
