"""A checkpoint computed as a runtime does that has float16 alone, such as on the Atlas 300I Duo.

Every tensor between two operators is rounded to float16: norms, projections, attention's output,
the gated product and the residual stream. Inside an operator sums are float32. Rotary embedding and
attention are one operator, and logits stay float32. What is too large for float16 is an error here:
such a runtime would go on with infinity, then NaN.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ms_quant import kernels
from ms_quant.errors import MsQuantError
from ms_quant.formats.opening import ServedModel
from ms_quant.models.attention import Cache
from ms_quant.models.host_block import NO_LINEARS, HostBlock, Linear, linear_function
from ms_quant.models.names import block_prefix
from ms_quant.statistics.activation_range import AFTER, BEFORE, LARGEST, MIDDLE, Extreme

FLOAT16 = np.dtype(np.float16)


def to_float16(x: np.ndarray) -> np.ndarray:
    """float32 values rounded to float16, half to even; too large ones are infinite."""
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(FLOAT16).astype(np.float32)


class Float16OverflowError(MsQuantError):
    """An activation does not fit float16."""


class Float16Block(HostBlock):
    """One decoder layer of a checkpoint.

    Raises:
        Float16OverflowError: an activation is too large; names block, place, channel and value.
    """

    def __init__(self, model: ServedModel, index: int, length: int):
        super().__init__(model.config, length)
        self.index = index
        prefix = block_prefix(index)
        self.linears: dict[str, Linear] = {}
        for path in model.config.block(index).linears:
            linear = model.linear(prefix + path)
            if linear is not None:
                self.linears[path] = linear_function(linear)
        for name in model.config.block(index).tensors:
            if name.rpartition(".")[0] not in self.linears:
                self.arrays[name] = to_float16(model.tensor(prefix + name))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The layer's output, float32 (B, S, hidden) of the same."""
        x = self._fits(BEFORE, x)
        with np.errstate(invalid="ignore", over="ignore"):
            middle = self._fits(MIDDLE, self.attend(x, self.linears))
            return self._fits(AFTER, self.feed_forward(middle, self.linears))

    def heads(
        self, x: np.ndarray, linears: Mapping[str, Linear] = NO_LINEARS, cache: Cache | None = None
    ) -> np.ndarray:
        return self._fits("self_attn.o_proj input", super().heads(x, linears, cache))

    def gated(self, x: np.ndarray, linears: Mapping[str, Linear] = NO_LINEARS) -> np.ndarray:
        return self._fits("mlp.down_proj input", super().gated(x, linears))

    def _norm(self, path: str, x: np.ndarray) -> np.ndarray:
        return self._fits(f"{path} output", super()._norm(path, x))

    def _project(self, path: str, x: np.ndarray, linears: Mapping[str, Linear]) -> np.ndarray:
        return self._fits(f"{path} output", super()._project(path, x, linears))

    def _fits(self, place: str, x: np.ndarray) -> np.ndarray:
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

    def __init__(self, model: ServedModel, length: int):
        if any(model.cache_scales(index) for index in range(model.config.num_layers)):
            raise MsQuantError(
                "--float16 computes keys and values in float16, expected a checkpoint without C8"
            )
        self.model, self.length = model, length
        self.gain = to_float16(model.tensor("model.norm.weight"))

    def block(self, index: int) -> Float16Block:
        return Float16Block(self.model, index, self.length)

    def norm(self, x: np.ndarray) -> np.ndarray:
        return to_float16(kernels.rms_norm(x, self.gain, self.model.config.rms_norm_eps))
