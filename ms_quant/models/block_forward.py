"""The forward of a decoder block on a CPU, in NumPy and native kernels.

Calibration, evaluation and generation run it. The Cells of :mod:`ms_quant.cells.decoder` compute
the same in MindSpore.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from ms_quant import kernels
from ms_quant.models.attention import Cache, attention, causal_mask
from ms_quant.models.config import ModelConfig
from ms_quant.models.linear_forward import FloatForward, Linear, QuantizedForward
from ms_quant.models.names import block_prefix
from ms_quant.models.rope import rope_table, still_table
from ms_quant.numerics.linear import QuantizedLinear

if TYPE_CHECKING:
    from typing import Self


class Positions:
    """Where the tokens of a forward stand: their rotary angles, and the keys that each may see.

    Args:
        config: the model's shape.
        stop: the position after the last token; there is a key for each position before it.
        start: the position of the first token.

    Attributes:
        mask: additive float32 (1, 1, stop - start, stop).
    """

    def __init__(self, config: ModelConfig, stop: int, start: int = 0):
        tokens = np.arange(start, stop)
        self._turned = rope_table(config.rope, config.head_dim, tokens, config.max_position)
        self.mask = causal_mask(stop, start=start)

    def angles(self, rotated: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines, float32 (stop - start, D); of a block without rotary embedding those
        that turn nothing."""
        return self._turned if rotated else self._still

    @cached_property
    def _still(self) -> tuple[np.ndarray, np.ndarray]:
        return still_table(self._turned)


def _all_float(path: str) -> None:
    """No linear is quantized."""


class BlockForward:
    """x + attention(norm(x)), then + mlp(norm(.)), float32 (B, S, hidden) of the same.

    Args:
        config: the model's shape.
        index: which of the model's blocks it is.
        arrays: the block's float32 parameters by their names within it.
        linears: what computes the linears by their paths, where that is not in `arrays`.

    Attributes:
        linears: what computes each linear.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        arrays: dict[str, np.ndarray],
        linears: Mapping[str, Linear],
    ):
        self.config, self.index, self.arrays = config, index, arrays
        floats = {
            path: FloatForward(arrays[f"{path}.weight"], arrays.get(f"{path}.bias"))
            for path in config.block(index).linears
            if path not in linears
        }
        self.linears: Mapping[str, Linear] = {**floats, **linears}

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        index: int,
        read: Callable[[str], np.ndarray],
        quantized: Callable[[str], QuantizedLinear | None] = _all_float,
    ) -> Self:
        """A block of a checkpoint.

        Args:
            config: the model's shape.
            index: which block it is.
            read: gives a float32 parameter by its name in a checkpoint.
            quantized: gives the quantized linear at a path in a checkpoint; None for a float one.
        """
        prefix, linears = block_prefix(index), dict[str, Linear]()
        for path in config.block(index).linears:
            linear = quantized(prefix + path)
            if linear is not None:
                linears[path] = QuantizedForward(linear)
        arrays = {
            name: read(prefix + name)
            for name in config.block(index).tensors
            if name.rpartition(".")[0] not in linears
        }
        return cls(config, index, arrays, linears)

    def with_linears(self, linears: Mapping[str, Linear]) -> Self:
        """The same block with other linears at some paths; what it holds is shared."""
        other = copy(self)
        other.linears = {**self.linears, **linears}
        return other

    def in_decode(self) -> Self:
        """The block as it computes when a generation goes on token by token."""
        return self.with_linears(
            {
                path: partial(linear, decode=True)
                for path, linear in self.linears.items()
                if isinstance(linear, QuantizedForward) and linear.phased
            }
        )

    def __call__(self, x: np.ndarray, at: Positions, cache: Cache | None = None) -> np.ndarray:
        """The block's output; what is not finite goes on in it."""
        with np.errstate(all="ignore"):
            return self.feed_forward(self.attend(x, at, cache))

    def attend(self, x: np.ndarray, at: Positions, cache: Cache | None = None) -> np.ndarray:
        """The first half.

        Args:
            x: float32 (B, S, hidden).
            at: the positions of the S tokens.
            cache: takes their keys and values, and gives those of all tokens so far.
        """
        return self.add_heads(x, self.heads(x, at, cache))

    def feed_forward(self, x: np.ndarray) -> np.ndarray:
        """The second half."""
        return self.add_gated(x, self.gated(x))

    def heads(self, x: np.ndarray, at: Positions, cache: Cache | None = None) -> np.ndarray:
        """The input of o_proj, (B, S, heads * D); arguments as of :meth:`attend`."""
        batch, length, _ = x.shape
        rows = self._norm("input_layernorm", x)
        q, k, v = (
            self._project(f"self_attn.{name}_proj", rows).reshape(
                batch, length, -1, self.config.head_dim
            )
            for name in "qkv"
        )
        if self.config.qk_norm:
            q, k = self._norm("self_attn.q_norm", q), self._norm("self_attn.k_norm", k)
        angles = at.angles(self.config.rotates(self.index))
        return attention(q, k, v, angles, at.mask, cache)

    def add_heads(self, x: np.ndarray, heads: np.ndarray) -> np.ndarray:
        """x + o_proj(heads)."""
        return self._added("self_attn.o_proj", x, heads)

    def gated(self, x: np.ndarray) -> np.ndarray:
        """The input of down_proj, (B * S, intermediate)."""
        rows = self._norm("post_attention_layernorm", x)
        gate = self._project("mlp.gate_proj", rows)
        return kernels.swiglu(gate, self._project("mlp.up_proj", rows))

    def add_gated(self, x: np.ndarray, gated: np.ndarray) -> np.ndarray:
        """x + down_proj(gated)."""
        return self._added("mlp.down_proj", x, gated)

    def _norm(self, path: str, x: np.ndarray) -> np.ndarray:
        return kernels.rms_norm(x, self.arrays[f"{path}.weight"], self.config.rms_norm_eps)

    def _project(self, path: str, x: np.ndarray) -> np.ndarray:
        return self.linears[path](x.reshape(-1, x.shape[-1]))

    def _added(self, path: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        y = self._project(path, y).reshape(x.shape)
        with np.errstate(all="ignore"):  # whoever looks at the sum finds what is not finite
            return np.add(x, y, out=y)
