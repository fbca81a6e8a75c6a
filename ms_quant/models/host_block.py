"""One decoder layer on a CPU without MindSpore: what calibration runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ms_quant import kernels
from ms_quant.models.attention import Cache, attention, causal_mask
from ms_quant.models.config import ModelConfig
from ms_quant.models.rope import rope_table, still_table
from ms_quant.numerics.linear import QuantizedLinear

Linear = Callable[[np.ndarray], np.ndarray]
"""float32 (rows, out) of float32 (rows, in)."""

NO_LINEARS: Mapping[str, Linear] = {}


class HostBlock:
    """x + attention(norm(x)), then + mlp(norm(.)), in float32 NumPy and native kernels.

    It computes what :class:`ms_quant.cells.decoder.DecoderBlock` does, for windows of one length
    that all begin at position 0.

    Args:
        config: the model's shape.
        length: tokens of a window.

    Attributes:
        arrays: the block's float32 parameters by their names in a checkpoint, once they are loaded.
        index: which of the model's blocks it is.
    """

    def __init__(self, config: ModelConfig, length: int):
        self.config, self.arrays = config, dict[str, np.ndarray]()
        self.index, positions = 0, np.arange(length)
        self._turned = rope_table(config.rope, config.head_dim, positions, config.max_position)
        self.mask = causal_mask(length)

    @property
    def angles(self) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines of the block's rotary embedding."""
        return self._turned if self.config.rotates(self.index) else still_table(self._turned)

    def load(self, read: Callable[[str], np.ndarray], prefix: str = "") -> None:
        """Takes what ``read`` gives for each parameter's name after a prefix, one at a time."""
        for name in self.config.block(self.index).tensors:
            self.arrays[name] = read(prefix + name)

    def linear(self, path: str, rows: np.ndarray) -> np.ndarray:
        """The float linear at a path: (rows, out) of (rows, in)."""
        weight, bias = self.arrays[f"{path}.weight"], self.arrays.get(f"{path}.bias")
        return kernels.matmul(rows, weight, bias)

    def attend(
        self, x: np.ndarray, linears: Mapping[str, Linear] = NO_LINEARS, cache: Cache | None = None
    ) -> np.ndarray:
        """The first half.

        Args:
            x: float32 (B, S, hidden).
            linears: what is called in place of the float linears at some paths.
            cache: sees the keys and values.
        """
        return self.add_heads(x, self.heads(x, linears, cache), linears)

    def feed_forward(self, x: np.ndarray, linears: Mapping[str, Linear] = NO_LINEARS) -> np.ndarray:
        """The second half; arguments as of :meth:`attend`."""
        return self.add_gated(x, self.gated(x, linears), linears)

    def heads(
        self, x: np.ndarray, linears: Mapping[str, Linear] = NO_LINEARS, cache: Cache | None = None
    ) -> np.ndarray:
        """The input of o_proj, (B, S, heads * D); arguments as of :meth:`attend`."""
        batch, length, _ = x.shape
        rows = self._norm("input_layernorm", x)
        q, k, v = (
            self._project(f"self_attn.{name}_proj", rows, linears).reshape(
                batch, length, -1, self.config.head_dim
            )
            for name in "qkv"
        )
        if self.config.qk_norm:
            q, k = self._norm("self_attn.q_norm", q), self._norm("self_attn.k_norm", k)
        return attention(q, k, v, self.angles, self.mask, cache)

    def add_heads(
        self, x: np.ndarray, heads: np.ndarray, linears: Mapping[str, Linear] = NO_LINEARS
    ) -> np.ndarray:
        """x + o_proj(heads)."""
        return self._added("self_attn.o_proj", x, heads, linears)

    def gated(self, x: np.ndarray, linears: Mapping[str, Linear] = NO_LINEARS) -> np.ndarray:
        """The input of down_proj, (B * S, intermediate)."""
        rows = self._norm("post_attention_layernorm", x)
        gate = self._project("mlp.gate_proj", rows, linears)
        return kernels.swiglu(gate, self._project("mlp.up_proj", rows, linears))

    def add_gated(
        self, x: np.ndarray, gated: np.ndarray, linears: Mapping[str, Linear] = NO_LINEARS
    ) -> np.ndarray:
        """x + down_proj(gated)."""
        return self._added("mlp.down_proj", x, gated, linears)

    def _norm(self, path: str, x: np.ndarray) -> np.ndarray:
        return kernels.rms_norm(x, self.arrays[f"{path}.weight"], self.config.rms_norm_eps)

    def _project(self, path: str, x: np.ndarray, linears: Mapping[str, Linear]) -> np.ndarray:
        rows = x.reshape(-1, x.shape[-1])
        return linears[path](rows) if path in linears else self.linear(path, rows)

    def _added(
        self, path: str, x: np.ndarray, y: np.ndarray, linears: Mapping[str, Linear]
    ) -> np.ndarray:
        y = self._project(path, y, linears).reshape(x.shape)
        with np.errstate(all="ignore"):  # whoever looks at the sum finds what is not finite
            return np.add(x, y, out=y)


def linear_function(linear: QuantizedLinear) -> Linear:
    """A quantized linear by the kernels, or as its definition says where they have none for it."""
    packed = kernels.pack(linear)
    if packed is None:
        return linear.forward
    if not kernels.transforms(linear):
        return packed
    return lambda rows: packed(linear.transformed(rows))
