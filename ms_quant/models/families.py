"""The family table: what is known about each decoder, as data.

A new family that is built from the same parts is one row of ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ms_quant.models.gated_block import KINDS, gated_block

if TYPE_CHECKING:
    from ms_quant.models.block_spec import BlockSpec
    from ms_quant.models.config import ModelConfig

BlockBuilder = Callable[["ModelConfig", int], "BlockSpec"]
"""Makes the block of an index."""


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
    block: BlockBuilder = gated_block
    kinds: tuple[str, ...] = KINDS

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that compute what this project does, by what they give out."""
        return tuple(f"{self.base}{ending}" for ending in (*GENERATES, *EMBEDS, *CLASSIFIES))

    @property
    def own_keys(self) -> frozenset[str]:
        """Config keys that this family reads and others may not."""
        found = [self.qkv_bias, self.o_bias, self.mlp_bias]
        always = ("attention_bias", "qkv_bias", "use_qkv_bias") if self.qkv_bias is True else ()
        return frozenset([*(k for k in found if isinstance(k, str)), *always, *self.defaults])


GENERATES, EMBEDS = ("ForCausalLM",), ("Model",)
CLASSIFIES = ("ForSequenceClassification", "ForTokenClassification")
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32}

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
