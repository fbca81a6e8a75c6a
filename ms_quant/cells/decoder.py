"""Decoder language models as MindSpore Cells, computed in float32.

Parameter names are those of the Hugging Face checkpoint, so a tensor is found by its name.
Float32 is the type in which MindSpore's CPU kernels are complete and fast; on Ascend the same
Cells run in whatever type their parameters are cast to.

Layers that predict further tokens (``num_nextn_predict_layers``) are no part of the network: their
tensors are not loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ms_quant.budget import BUDGET, Budget
from ms_quant.cells.attention import Attention
from ms_quant.cells.experts import MLP, Experts
from ms_quant.cells.latent_attention import LatentAttention
from ms_quant.cells.layers import Embedding, Residual, RMSNorm, dense
from ms_quant.errors import BadArgumentError
from ms_quant.models import attention, experts, gated_block, latent_attention
from ms_quant.models.block_spec import Branch
from ms_quant.models.config import ModelConfig
from ms_quant.models.rope import rope_table, still_table

_ATTENTION: dict[type[Branch], Callable[..., nn.Cell]] = {
    gated_block.Attention: Attention,
    latent_attention.LatentAttention: LatentAttention,
}
_MLP: dict[type[Branch], Callable[[ModelConfig, int], nn.Cell]] = {
    gated_block.GatedMlp: lambda config, index: MLP(config.block(index).linears),
    experts.Experts: Experts,
}


def _cells(config: ModelConfig, index: int) -> tuple[Callable[..., nn.Cell], ...]:
    """What makes the Cells of a block's two branches."""
    branches = config.block(index).branches
    makers = [kinds.get(type(b)) for kinds, b in zip((_ATTENTION, _MLP), branches, strict=False)]
    found = tuple(maker for maker in makers if maker is not None)
    if len(branches) != 2 or len(found) != 2:
        titles = ", ".join(f"{type(b).__module__}.{type(b).__name__}" for b in branches)
        raise BadArgumentError(
            f"block {index} of this {config.model_type} is made of {titles}, expected attention, "
            "then one MLP or experts: no Cells compute others"
        )
    return found


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
        attention, mlp = _cells(config, index)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention(config, index, budget)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp(config, index)
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
        for layer, rotated in zip(self.layers, self.rotated):  # noqa: B905, graphs know no strict
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
        - **cos**, **sin** - float32 (S, rotary channels), from :func:`rope_tensors`.
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
    table = rope_table(config.rope, config.rotary_size, np.arange(start, stop), config.max_position)
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
