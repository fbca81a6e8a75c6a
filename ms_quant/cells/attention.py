"""Attention over grouped key-value heads as a Cell, and what every attention shares."""

from __future__ import annotations

import math

from mindspore import Tensor, nn, ops

from ms_quant.budget import BUDGET, Budget
from ms_quant.cells.direct import as_type, calls_directly, floats, has_kernels, threads
from ms_quant.cells.layers import (
    RMSNorm,
    Softmax,
    TransposeHeads,
    dense,
    project,
    repeat_rows,
    rotate_half_matrix,
)
from ms_quant.models import attention
from ms_quant.models.config import ModelConfig


class Heads(nn.Cell):
    """What heads read of values, for attentions to inherit; native kernels run ``_direct``.

    Args:
        scale: factor on the scores.
        budget: what bounds its memory.
    """

    def __init__(self, scale: float, budget: Budget):
        super().__init__()
        self.budget, self.score_bytes, self.scale = budget, budget.score_bytes, scale
        self.softmax, self.transpose_heads = Softmax(), TransposeHeads()
        self.scores = ops.BatchMatMul(transpose_b=True)

    def __call__(self, *args, **kwargs):
        if not (has_kernels() and calls_directly(self)):
            return super().__call__(*args, **kwargs)
        return self._direct(*args, **kwargs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """(B, heads, S, E) of (B, heads, S, D) queries, (B, kv heads, T, D) keys and
        (B, kv heads, T, E) values, in as few slices of queries as memory allows."""
        batch, heads, length, _ = q.shape
        step = max(1, self.score_bytes // (4 * batch * heads * k.shape[2]))
        if step >= length:
            return self.attend_slice(q, k, v, mask)
        parts = []
        for start in range(0, length, step):
            stop = min(start + step, length)
            parts.append(self.attend_slice(q[:, :, start:stop], k, v, mask[:, :, start:stop]))
        return ops.concat(parts, 2)

    def attend_slice(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        batch, heads, length, size = q.shape
        kv_heads, total = k.shape[1], k.shape[2]
        # The query heads that share a key-value head are stacked along the token axis: one
        # batched product for each key-value head, and keys are never repeated in memory.
        share = heads // kv_heads
        q = q.reshape(batch * kv_heads, share * length, size)
        k = k.reshape(batch * kv_heads, total, size)
        v = v.reshape(batch * kv_heads, total, -1)
        scores = self.scores(q * self.scale, k)
        repeated = batch * heads // mask.shape[0]
        mask = ops.bmm(
            ops.ones((mask.shape[0], repeated, 1), q.dtype), mask.reshape(-1, 1, length * total)
        )
        weights = self.softmax(scores.reshape(-1, total) + mask.reshape(-1, total))
        weights = weights.reshape(batch * kv_heads, share * length, total)
        return ops.bmm(weights, v).reshape(batch, heads, length, -1)


class Attention(Heads):
    """Causal self-attention with grouped key-value heads, rotary positions and optional q/k norm.

    Args:
        config: the model's shape.
        index: the layer.
        budget: what bounds its memory.

    Inputs:
        - **x** - (B, S, hidden).
        - **cos**, **sin** - (S, head_dim).
        - **mask** - additive, (B or 1, 1, S, T).
        - **cache** - None, or a :class:`KeyValueCache` layer slot that holds earlier tokens.
        - **decode** - whether a generation goes on token by token: some quantized linears then
          quantize their input in another way.
    """

    def __init__(self, config: ModelConfig, index: int = 0, budget: Budget = BUDGET):
        super().__init__(1.0 / math.sqrt(config.head_dim), budget)
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        linears = config.block(index).linears
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            spec = linears[f"self_attn.{name}"]
            setattr(self, name, dense(spec.in_features, spec.out_features, spec.bias))
        self.rotate_half = Tensor(rotate_half_matrix(config.head_dim))
        self.qk_norm = "self_attn.q_norm" in config.block(index).norms
        if self.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def _direct(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        cache=None,
        decode: bool = False,
    ) -> Tensor:
        """The same as ``construct`` in NumPy and native kernels."""
        q, k, v = map(floats, self.by_head(x, decode))
        angles = floats(cos), floats(sin)
        y = attention.attention(q, k, v, angles, floats(mask), cache, threads(), self.budget)
        return project(self.o_proj, as_type(y, x.dtype), decode)

    def construct(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        cache=None,
        decode: bool = False,
    ) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.by_head(x, decode)
        q = self.rotate(self.transpose_heads(q), cos, sin)
        k = self.rotate(self.transpose_heads(k), cos, sin)
        v = self.transpose_heads(v)
        if cache is not None:
            k, v = cache.append(k, v)
        y = self.attend(q, k, v, mask)
        return project(self.o_proj, self.transpose_heads(y).reshape(batch, length, -1), decode)

    def by_head(self, x: Tensor, decode: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, S, heads, D), before their rotation."""
        batch, length, _ = x.shape
        q = project(self.q_proj, x, decode).reshape(batch, length, self.heads, self.head_dim)
        k = project(self.k_proj, x, decode).reshape(batch, length, self.kv_heads, self.head_dim)
        v = project(self.v_proj, x, decode).reshape(batch, length, self.kv_heads, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = ops.matmul(x.reshape(-1, self.head_dim), self.rotate_half).reshape(x.shape)
        count = x.shape[0] * x.shape[1]
        cos, sin = repeat_rows(cos, count), repeat_rows(sin, count)
        return x * cos.reshape(x.shape) + turned * sin.reshape(x.shape)
