"""The blocks of a checkpoint computed in float32, over windows that begin at position 0."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ms_quant import kernels
from ms_quant.budget import BUDGET, Budget
from ms_quant.evaluation.caches import new_caches
from ms_quant.formats.opening import ServedModel
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.names import block_prefix
from ms_quant.numerics.affine import check_finite


def load_block(model: ServedModel, index: int, budget: Budget = BUDGET) -> BlockForward:
    """One decoder block of a checkpoint with its quantized linears."""
    return BlockForward.load(model.config, index, model.tensor, model.linear, budget)


class LastNorm:
    """The norm after the last block of a checkpoint."""

    def __init__(self, model: ServedModel):
        self.gain, self.eps = model.tensor("model.norm.weight"), model.config.rms_norm_eps

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """float32 (..., hidden) of the same."""
        return kernels.rms_norm(x, self.gain, self.eps)


def check_output(hidden: np.ndarray, index: int) -> np.ndarray:
    """The output of a block.

    Raises:
        MsQuantError: a value is NaN or infinite; names the block.
    """
    check_finite(hidden, f"{block_prefix(index)[:-1]}: output")
    return hidden


class Float32Forward:
    """What perplexity runs. Arguments are those of :func:`ms_quant.evaluation.perplexity`."""

    def __init__(
        self,
        model: ServedModel,
        length: int,
        decode: bool,
        kv_cache: str | None,
        budget: Budget,
    ):
        self.model, self.decode, self.budget = model, decode, budget
        self.new_caches = new_caches(model, kv_cache)
        self.positions, self.norm = Positions(model.config, length), LastNorm(model)

    def block(self, index: int) -> Callable[[np.ndarray], np.ndarray]:
        """The output of a block, float32 (B, S, hidden) of the same, all values finite."""
        block = load_block(self.model, index, self.budget)
        if self.decode:
            block = block.in_decode()

        def output(hidden: np.ndarray) -> np.ndarray:
            cache = self.new_caches[index]()
            return check_output(block(hidden, self.positions, cache), index)

        return output
