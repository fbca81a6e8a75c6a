"""The blocks of a gated decoder: attention, then an MLP with a gate, each behind a norm."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ms_quant import kernels
from ms_quant.models.attention import TAPS, attention
from ms_quant.models.block_spec import (
    BlockSpec,
    Branch,
    CacheSpec,
    Division,
    LinearGroup,
    LinearSpec,
    NormSpec,
    Operators,
    Part,
)
from ms_quant.models.edge import Edge

if TYPE_CHECKING:
    from ms_quant.models.block_forward import Positions
    from ms_quant.models.cache import AnyCache
    from ms_quant.models.config import ModelConfig

KINDS = "qkv", "o", "gate_up", "down"
"""What recipes call the groups of these blocks."""


class Attention(Branch):
    """Attention over grouped key-value heads, a branch of its own.

    Args:
        config: the model's shape.
        rotary: whether queries and keys have a rotary embedding.
        path: its path in the block.
        norm: path of the norm before it.
        after: path of a norm after it; "" is none.
    """

    title = "attention"
    taps = *TAPS, "attention output"

    def __init__(
        self,
        config: ModelConfig,
        rotary: bool = True,
        path: str = "self_attn",
        norm: str = "input_layernorm",
        after: str = "",
    ):
        self.path, self.norm, self.after, self.rotary = path, norm, after, rotary
        self.order = config.rotary_order
        self.head_dim, self.qk_norm = config.head_dim, config.qk_norm
        hidden, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
        whole = Division("column", "num_attention_heads", heads)
        shared = Division("column", "num_key_value_heads", kv_heads, copied=True)
        out = Division("row", "num_attention_heads", heads)
        size, kv_size, bias = heads * self.head_dim, kv_heads * self.head_dim, config.qkv_bias
        q, k, v, o = (f"{path}.{name}_proj" for name in "qkvo")
        qkv = {
            q: LinearSpec(size, hidden, bias, whole, reads_stream=True, scores=True),
            k: LinearSpec(kv_size, hidden, bias, shared, reads_stream=True, scores=True),
            v: LinearSpec(kv_size, hidden, bias, shared, reads_stream=True, heads_axis=0),
        }
        output = LinearSpec(
            hidden, size, config.o_bias, out, writes_stream=not after, heads_axis=-1
        )
        within = NormSpec(self.head_dim, reads_stream=False)
        names = [f"{path}.{name}_norm" for name in "qk"] if self.qk_norm else []
        self.modules = {
            norm: NormSpec(hidden),
            **qkv,
            o: output,
            **dict.fromkeys(names, within),
        }
        if after:
            self.modules[after] = NormSpec(hidden, reads_stream=False, writes_stream=True)
        self.groups = (
            LinearGroup("qkv", "qkv", qkv, f"{path}.qkv_proj", "attention"),
            LinearGroup("o", "o", {o: output}, o, "attention"),
        )
        self.edges = (
            Edge(norm, ("qkv",), norm=True),
            Edge(v, ("o",), repeats=heads // kv_heads, size=self.head_dim, averaged=True),
        )
        self.last = (o,)
        self.cached = {k: CacheSpec("k", kv_size), v: CacheSpec("v", kv_size)}

    def inner(
        self, ops: Operators, x: np.ndarray, at: Positions, cache: AnyCache | None
    ) -> np.ndarray:
        """The input of o_proj, (B, S, heads * D)."""
        batch, length, _ = x.shape
        rows = ops.norm(self.norm, x)
        q, k, v = (
            ops.linear(f"{self.path}.{name}_proj", rows).reshape(batch, length, -1, self.head_dim)
            for name in "qkv"
        )
        if self.qk_norm:
            q, k = ops.norm(f"{self.path}.q_norm", q), ops.norm(f"{self.path}.k_norm", k)
        angles = at.angles(self.rotary)
        y = attention(
            q, k, v, angles, at.mask, cache, budget=ops.budget, show=ops.show, order=self.order
        )
        ops.show(self.taps[-1], y)
        return ops.between(f"{self.path}.o_proj input", y)

    def outer(self, ops: Operators, inner: np.ndarray) -> np.ndarray:
        """o_proj of it, and the norm after that."""
        y = ops.linear(f"{self.path}.o_proj", inner)
        return ops.norm(self.after, y) if self.after else y


class GatedMlp(Branch):
    """down(silu(gate(x)) * up(x)), a branch of its own or a part of one.

    Args:
        hidden: channels of the residual stream.
        size: inner channels.
        bias: whether its linears have one.
        path: its path in the block.
        label: what stands before the names of its groups.
        unit: what the config calls the inner channels.
        norm: path of the norm before it.
        part: which MLP it is.
    """

    title = "mlp"

    def __init__(
        self,
        hidden: int,
        size: int,
        bias: bool = False,
        path: str = "mlp",
        label: str = "",
        unit: str = "intermediate_size",
        norm: str = "post_attention_layernorm",
        part: Part = "dense",
    ):
        self.path, self.norm = path, norm
        gate, up, down = (f"{path}.{name}_proj" for name in ("gate", "up", "down"))
        inner, outer = _mlp_linears(hidden, size, bias, unit)
        self.modules = {
            norm: NormSpec(hidden),
            gate: inner,
            up: inner,
            down: outer,
        }
        both, last = f"{label}gate_up", f"{label}down"
        self.groups = (
            LinearGroup(both, "gate_up", {gate: inner, up: inner}, f"{path}.gate_up_proj", part),
            LinearGroup(last, "down", {down: outer}, down, part),
        )
        self.edges = Edge(norm, (both,), norm=True), Edge(up, (last,))
        self.last = (down,)

    def inner(
        self, ops: Operators, x: np.ndarray, at: Positions, cache: AnyCache | None
    ) -> np.ndarray:
        """The input of down_proj, (B * S, size)."""
        return self.gated(ops, ops.norm(self.norm, x))

    def gated(self, ops: Operators, rows: np.ndarray) -> np.ndarray:
        """The same of what the norm gives."""
        gate = ops.linear(f"{self.path}.gate_proj", rows)
        gated = kernels.swiglu(gate, ops.linear(f"{self.path}.up_proj", rows))
        return ops.between(f"{self.path}.down_proj input", gated)

    def outer(self, ops: Operators, inner: np.ndarray) -> np.ndarray:
        """down_proj of it."""
        return ops.linear(f"{self.path}.down_proj", inner)


@lru_cache
def _mlp_linears(hidden: int, size: int, bias: bool, unit: str) -> tuple[LinearSpec, LinearSpec]:
    """gate_proj and up_proj, and down_proj: one record for all experts of one size."""
    column, row = Division("column", unit, size), Division("row", unit, size)
    inner = LinearSpec(size, hidden, bias, column, reads_stream=True)
    return inner, LinearSpec(hidden, size, bias, row, writes_stream=True)


def gated_block(config: ModelConfig, index: int) -> BlockSpec:
    """A block of a dense decoder."""
    mlp = GatedMlp(config.hidden_size, config.intermediate_size, config.mlp_bias)
    return BlockSpec.of(index, (Attention(config, config.rotates(index)), mlp))
