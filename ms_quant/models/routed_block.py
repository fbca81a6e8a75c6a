"""The blocks of decoders with experts: Qwen2-MoE, Qwen3-MoE, DeepSeek-V3 and Kimi-K2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ms_quant.models.block_spec import BlockSpec, Branch, LinearSpec, NormSpec
from ms_quant.models.experts import Experts
from ms_quant.models.gated_block import Attention, GatedMlp
from ms_quant.models.latent_attention import LatentAttention

if TYPE_CHECKING:
    from ms_quant.models.config import ModelConfig


def qwen_block(config: ModelConfig, index: int) -> BlockSpec:
    """A block of Qwen2-MoE or Qwen3-MoE."""
    return BlockSpec.of(index, (Attention(config), _mlp(config, index, "mlp.shared_expert")))


def deepseek_block(config: ModelConfig, index: int) -> BlockSpec:
    """A block of DeepSeek-V3 or Kimi-K2; after the last one those that predict further tokens."""
    main = index < config.num_layers  # others draft, with a cache in float in every runtime
    attention = LatentAttention(config, caches=main)
    branches = attention, _mlp(config, index, "mlp.shared_experts")
    further = {} if main else _around(config)
    return BlockSpec.of(index, branches, further)


def _mlp(config: ModelConfig, index: int, shared: str) -> Branch:
    assert config.routing is not None
    if index in config.routing.sparse:
        return Experts(config.hidden_size, config.routing, shared)
    return GatedMlp(config.hidden_size, config.intermediate_size, config.mlp_bias)


def _around(config: ModelConfig) -> dict[str, LinearSpec | NormSpec]:
    """What a block that predicts the next but one token has beside its branches."""
    hidden, vocab = config.hidden_size, config.vocab_size
    return {
        "enorm": NormSpec(hidden),
        "hnorm": NormSpec(hidden, behind="model.norm"),
        "shared_head.norm": NormSpec(hidden),
        "eh_proj": LinearSpec(
            hidden, 2 * hidden, reads_stream=True, writes_stream=True, norms=("enorm", "hnorm")
        ),
        "embed_tokens": LinearSpec(vocab, hidden, reads_stream=True),
        "shared_head.head": LinearSpec(
            vocab, hidden, reads_stream=True, norms=("shared_head.norm",)
        ),
    }
