"""The family table: what is known about each decoder, as data.

A new family that is built from the same parts is one row of ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ms_quant.models.gated_block import KINDS, gated_block
from ms_quant.models.glm_block import glm_block
from ms_quant.models.latent_attention import KINDS as LATENT_KINDS
from ms_quant.models.routed_block import deepseek_block, qwen_block
from ms_quant.models.routing import Routing, read_deepseek, read_qwen

if TYPE_CHECKING:
    from ms_quant.models.block_spec import BlockSpec
    from ms_quant.models.config import ModelConfig

BlockBuilder = Callable[["ModelConfig", int], "BlockSpec"]
"""Makes the block of an index."""
RoutingReader = Callable[[Mapping[str, Any], int, str], Routing]
"""Reads the experts of a config with defaults, of so many layers, from a file."""


GENERATES, EMBEDS = ("ForCausalLM",), ("Model",)
CLASSIFIES = ("ForSequenceClassification", "ForTokenClassification")
SEES = ("ForConditionalGeneration",)


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        base: what its classes are called, as in ``LlamaForCausalLM``.
        qkv_bias: True, or the name of the config key that decides.
        o_bias: True, False, or the name of the config key that decides.
        mlp_bias: True, False, or the name of the config key that decides.
        qk_norm: RMS norm over each head of q and k before the rotary embedding.
        flagged_window: whether ``use_sliding_window`` turns a window on; where it does not, a
            ``sliding_window`` is one of all layers.
        defaults: what transformers takes where a key is absent, beside what all families share.
        required: keys that have to be there: what is taken for them is not known.
        skips_rotation: whether ``no_rope_layers`` names layers without a rotary embedding; only
            those have a window then, if there is one.
        custom_code: whether the runtimes' own configs do not know the family, but ``auto_map``.
        keys: config keys that it reads beside those of all families, and that have no default.
        routing: reads its experts; None of a family that has none.
        latent: whether its attention is multi-head latent attention.
        generates: what the names of its generating classes end with.
        nested: whether it is a text model in a larger one, whose config may be in that one's.
        carried: what the names of the other tensors of the larger model begin with.
        partial_rotary: whether ``partial_rotary_factor`` says how many channels are turned.
        interleaved: whether neighbours are turned together, not channels half a head apart.
        block: makes a block; one of new maths has a file of its own.
        kinds: what recipes call the groups of its blocks.
    """

    base: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    flagged_window: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    skips_rotation: bool = False
    custom_code: bool = False
    keys: tuple[str, ...] = ()
    routing: RoutingReader | None = None
    latent: bool = False
    generates: tuple[str, ...] = GENERATES
    nested: bool = False
    carried: tuple[str, ...] = ()
    partial_rotary: bool = False
    interleaved: bool = False
    block: BlockBuilder = gated_block
    kinds: tuple[str, ...] = KINDS

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that compute what this project does, by what they give out."""
        return tuple(f"{self.base}{ending}" for ending in self._endings)

    @property
    def _endings(self) -> tuple[str, ...]:
        return (*self.generates, *(() if self.nested else (*EMBEDS, *CLASSIFIES)))

    @property
    def own_keys(self) -> frozenset[str]:
        """Config keys that this family reads and others may not."""
        found = [self.qkv_bias, self.o_bias, self.mlp_bias]
        always = ("attention_bias", "qkv_bias", "use_qkv_bias") if self.qkv_bias is True else ()
        named = (key for key in found if isinstance(key, str))
        return frozenset([*named, *always, *self.keys, *self.defaults])


_VISION: dict[str, Any] = {
    "generates": SEES,
    "nested": True,
    "carried": ("model.visual.", "visual."),
    "keys": ("vision_config", "image_token_id", "video_token_id", "vision_token_id")
    + ("vision_start_token_id", "vision_end_token_id"),
}
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
_QWEN_MOE = {
    "max_position_embeddings": 32768,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_EXPERTS = "num_experts", "num_local_experts"
_DEEPSEEK = Family(
    "DeepseekV3",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    required=("n_routed_experts", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
    + ("v_head_dim", "moe_intermediate_size", "num_experts_per_tok", "n_group", "topk_group")
    + ("routed_scaling_factor", "norm_topk_prob", "first_k_dense_replace", "n_shared_experts"),
    defaults={"q_lora_rank": 1536, "max_position_embeddings": 4096, "rope_interleave": True},
    keys=("n_routed_experts", "num_local_experts", "num_experts", "n_shared_experts")
    + ("num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group", "topk_method")
    + ("scoring_func", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace")
    + ("moe_layer_freq", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    + ("num_nextn_predict_layers", "aux_loss_alpha", "seq_aux", "ep_size", "qk_head_dim"),
    routing=read_deepseek,
    latent=True,
    block=deepseek_block,
    kinds=tuple(dict.fromkeys((*KINDS, *LATENT_KINDS))),
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "Llama", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "mistral": Family(
        "Mistral",
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Family("Qwen2", qkv_bias=True, flagged_window=True, defaults=_QWEN),
    "qwen3": Family(
        "Qwen3",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        flagged_window=True,
        defaults={**_QWEN, "head_dim": 128},
    ),
    "qwen2_moe": Family(
        "Qwen2Moe",
        qkv_bias=True,
        flagged_window=True,
        defaults={
            **_QWEN_MOE,
            "num_key_value_heads": 16,
            "num_experts_per_tok": 4,
        },
        keys=(*_EXPERTS, "moe_intermediate_size", "shared_expert_intermediate_size"),
        routing=partial(read_qwen, shared=True),
        block=qwen_block,
    ),
    "qwen3_moe": Family(
        "Qwen3Moe",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        flagged_window=True,
        defaults={**_QWEN_MOE, "num_key_value_heads": 4},
        keys=(*_EXPERTS, "moe_intermediate_size"),
        routing=read_qwen,
        block=qwen_block,
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VL",
        qkv_bias=True,
        flagged_window=True,
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
        },
        **_VISION,
    ),
    "qwen3_vl": Family(
        "Qwen3VL",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        defaults={
            "max_position_embeddings": 128000,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "rope_theta": 500000.0,
        },
        **_VISION,
    ),
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
    "kimi_k25": replace(
        _DEEPSEEK,
        base="KimiK25",
        generates=SEES,
        nested=True,
        keys=(*_DEEPSEEK.keys, "vision_config"),
    ),
    "glm4": Family(
        "Glm4",
        qkv_bias="attention_bias",
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1.5625e-07,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
        },
        partial_rotary=True,
        interleaved=True,
        block=glm_block,
    ),
    "smollm3": Family(
        "SmolLM3",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        flagged_window=True,
        skips_rotation=True,
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
    ),
    "seed_oss": Family(
        "SeedOss",
        qkv_bias="attention_bias",
        o_bias="attention_out_bias",
        mlp_bias="mlp_bias",
        defaults={
            "max_position_embeddings": 524288,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
        },
    ),
    "internlm3": Family(
        "InternLM3",
        qkv_bias="qkv_bias",
        o_bias="bias",
        mlp_bias="bias",
        required=("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
        custom_code=True,
    ),
}
