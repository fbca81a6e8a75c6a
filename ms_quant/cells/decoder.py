"""Decoder language models as MindSpore Cells, computed in float32.

Parameter names are those of the Hugging Face checkpoint, so a tensor is found by its name.
Float32 is the type in which MindSpore's CPU kernels are complete and fast; on Ascend the same
Cells run in whatever type their parameters are cast to.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ms_quant.budget import BUDGET, Budget
from ms_quant.cells.direct import as_type, calls_directly, floats, has_kernels, threads
from ms_quant.cells.layers import (
    Embedding,
    Residual,
    RMSNorm,
    Softmax,
    SwiGLU,
    TransposeHeads,
    dense,
    project,
    repeat_rows,
    rotate_half_matrix,
)
from ms_quant.errors import BadArgumentError
from ms_quant.models import attention
from ms_quant.models.config import ModelConfig
from ms_quant.models.gated_block import gated_block
from ms_quant.models.rope import rope_table, still_table


class Attention(nn.Cell):
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
        super().__init__()
        self.budget, self.score_bytes = budget, budget.score_bytes
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        linears = config.block(index).linears
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            spec = linears[f"self_attn.{name}"]
            setattr(self, name, dense(spec.in_features, spec.out_features, spec.bias))
        self.rotate_half = Tensor(rotate_half_matrix(config.head_dim))
        self.softmax, self.transpose_heads = Softmax(), TransposeHeads()
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.qk_norm = "self_attn.q_norm" in config.block(index).norms
        if self.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def __call__(self, *args, **kwargs):
        if not (has_kernels() and calls_directly(self)):
            return super().__call__(*args, **kwargs)
        return self._direct(*args, **kwargs)

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
        angles, kept = (floats(cos), floats(sin)), None if cache is None else cache.extend
        y = attention.attention(q, k, v, angles, floats(mask), kept, threads(), self.budget)
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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """(B, heads, S, D) queries to values of that shape, in as few slices as memory allows."""
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
        batch, _, length, _ = q.shape
        total = k.shape[2]
        # The query heads that share a key-value head are stacked along the token axis: one
        # batched product for each key-value head, and keys are never repeated in memory.
        share = self.heads // self.kv_heads
        q = q.reshape(batch * self.kv_heads, share * length, self.head_dim)
        k = k.reshape(batch * self.kv_heads, total, self.head_dim)
        v = v.reshape(batch * self.kv_heads, total, self.head_dim)
        scores = self.scores(q * (1.0 / math.sqrt(self.head_dim)), k)
        heads = batch * self.heads // mask.shape[0]
        mask = ops.bmm(
            ops.ones((mask.shape[0], heads, 1), q.dtype), mask.reshape(-1, 1, length * total)
        )
        weights = self.softmax(scores.reshape(-1, total) + mask.reshape(-1, total))
        weights = weights.reshape(batch * self.kv_heads, share * length, total)
        return ops.bmm(weights, v).reshape(batch, self.heads, length, self.head_dim)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = ops.matmul(x.reshape(-1, self.head_dim), self.rotate_half).reshape(x.shape)
        count = x.shape[0] * x.shape[1]
        cos, sin = repeat_rows(cos, count), repeat_rows(sin, count)
        return x * cos.reshape(x.shape) + turned * sin.reshape(x.shape)


class MLP(nn.Cell):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, index: int = 0):
        super().__init__()
        linears = config.block(index).linears
        for name in ("gate_proj", "up_proj", "down_proj"):
            spec = linears[f"mlp.{name}"]
            setattr(self, name, dense(spec.in_features, spec.out_features, spec.bias))
        self.swiglu = SwiGLU()

    def construct(self, x: Tensor, decode: bool = False) -> Tensor:
        gate, up = project(self.gate_proj, x, decode), project(self.up_proj, x, decode)
        return project(self.down_proj, self.swiglu(gate, up), decode)


class DecoderBlock(nn.Cell):
    """One decoder layer: x + attention(norm(x)), then + mlp(norm(.)).

    Args:
        config: the model's shape.
        index: the layer.
        budget: what bounds its memory.

    Raises:
        MsQuantError: the layer is made of something else.
    """

    def __init__(self, config: ModelConfig, index: int = 0, budget: Budget = BUDGET):
        super().__init__()
        other = set(config.block(index).linears) ^ set(gated_block(config, index).linears)
        if other:
            raise BadArgumentError(
                f"block {index} of this {config.model_type} has linears such as "
                f"{min(other)}, expected those of attention and one MLP: no Cells compute others"
            )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index, budget)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, index)
        self.add = Residual()

    def construct(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        cache=None,
        decode: bool = False,
    ) -> Tensor:
        return self.feed_forward(self.attend(x, cos, sin, mask, cache, decode), decode)

    def attend(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        cache=None,
        decode: bool = False,
    ) -> Tensor:
        """The first half: x + attention(norm(x))."""
        y = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, decode)
        return self.add(x, y)

    def feed_forward(self, x: Tensor, decode: bool = False) -> Tensor:
        """The second half: x + mlp(norm(x))."""
        return self.add(x, self.mlp(self.post_attention_layernorm(x), decode))


class Decoder(nn.Cell):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.CellList([DecoderBlock(config, i) for i in range(config.num_layers)])
        self.rotated = tuple(block.rotary for block in config.blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def construct(self, ids: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer, rotated in zip(self.layers, self.rotated, strict=True):
            if rotated:
                x = layer(x, cos, sin, mask)
            else:
                x = layer(x, ops.ones_like(cos), ops.zeros_like(sin), mask)
        return self.norm(x)


class CausalLM(nn.Cell):
    """A decoder with its output head.

    Args:
        config: the model's shape.

    Inputs:
        - **ids** - int32 (B, S).
        - **cos**, **sin** - float32 (S, head_dim), from :func:`rope_tensors`.
        - **mask** - additive float32 (B or 1, 1, S, S), from :func:`causal_mask`.

    Outputs:
        Logits, float32 (B, S, vocab).

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = dense(config.hidden_size, config.vocab_size, False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def construct(self, ids: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        return self.lm_head(self.model(ids, cos, sin, mask))


def rope_tensors(
    config: ModelConfig, start: int, stop: int, rotated: bool = True
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions ``start`` to ``stop - 1`` as tensors.

    Args:
        config: the model's shape.
        start, stop: the positions.
        rotated: False for a layer that has no rotary embedding.
    """
    table = rope_table(config.rope, config.head_dim, np.arange(start, stop), config.max_position)
    cos, sin = table if rotated else still_table(table)
    return Tensor.from_numpy(cos), Tensor.from_numpy(sin)


def causal_mask(length: int, attention_mask: np.ndarray | None = None) -> Tensor:
    """Additive causal mask, with padding keys masked too.

    Args:
        length: number of tokens S.
        attention_mask: optional (B, S) array, 1 for a token and 0 for padding.

    Returns:
        float32 tensor of shape (1 or B, 1, S, S).
    """
    return Tensor.from_numpy(attention.causal_mask(length, attention_mask))


def forward(model: CausalLM, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Tensor:
    """Logits of a batch of token ids.

    Args:
        model: the model.
        ids: integer array (B, S).
        attention_mask: optional (B, S), 0 for padding.
    """
    length = ids.shape[1]
    cos, sin = rope_tensors(model.config, 0, length)
    return model(ms.Tensor(ids.astype(np.int32)), cos, sin, causal_mask(length, attention_mask))
