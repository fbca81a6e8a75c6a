"""The keys of ``config.json`` beside shapes: harmless ones, and those that must be neutral.

What transformers and vLLM read of a config, and more that other architectures are told by, is
sorted here. A key that changes numbers where it is set, and that this project does not compute,
is refused unless its value says "nothing"; a key that is in no table is noted, not refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ms_quant.errors import BadFileError

if TYPE_CHECKING:
    from ms_quant.models.families import Family

_USED = """
model_type architectures auto_map hidden_size intermediate_size num_hidden_layers
num_attention_heads num_key_value_heads head_dim vocab_size rms_norm_eps
max_position_embeddings rope_theta rope_scaling rope_parameters partial_rotary_factor
original_max_position_embeddings tie_word_embeddings hidden_act dtype torch_dtype eos_token_id
use_sliding_window sliding_window max_window_layers layer_types no_rope_layers
no_rope_layer_interval quantization_config compression_config id2label num_labels
"""
USED = frozenset(_USED.split())
"""Keys that are read, each where it belongs."""

_HARMLESS = """
_name_or_path _attn_implementation _attn_implementation_autoset _commit_hash
_flash_attn_2_enabled attn_implementation transformers_version use_cache initializer_range
attention_dropout hidden_dropout hidden_dropout_prob embd_pdrop resid_pdrop attn_pdrop
residual_dropout classifier_dropout bos_token_id pad_token_id sep_token_id cls_token_id
mask_token_id unk_token_id decoder_start_token_id pad_token max_length min_length do_sample
early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
begin_suppress_tokens return_dict output_hidden_states output_attentions torchscript
use_bfloat16 tf_legacy_loss pruned_heads chunk_size_feed_forward is_decoder
tie_encoder_decoder cross_attention_hidden_size finetuning_task task_specific_params
problem_type prefix label2id tokenizer_class pretraining_tp
gradient_checkpointing unsloth_version unsloth_fixed unsloth_training_method use_flash_attn
use_flash_attention attn_impl mlp_only_layers decoder_sparse_step max_sequence_length
model_max_length seq_length max_seq_len n_positions tokenizer_padding_side padding_side
ignore_index pad_to_multiple_of keys_to_ignore_at_inference router_aux_loss_coef
output_router_logits norm_topk_prob vocab_parallel rope_scaling_type license is_llama_config
transformers.js_config
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Keys that change no number of a forward: training, generation, bookkeeping."""

_OFF: tuple[Any, ...] = (False, 0)
_ONE: tuple[Any, ...] = (1,)
_NO: tuple[Any, ...] = (False, 0, "")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "use_bidirectional_attention": _OFF,
    "bidirectional": _OFF,
    "is_bidirectional": _OFF,
    "bidirectional_attention": _OFF,
    "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
    "cross_attention_layers": ([],),
    "position_embedding_type": ("rope", "rotary"),
    "alibi": _OFF,
    "use_alibi": _OFF,
    "use_rope": (True,),
    "use_mrope": _OFF,
    "rope_interleaved": _OFF,
    "rope_interleave": _OFF,
    "rotary_interleaved": _OFF,
    "is_neox_style": (True,),
    "rotary_pct": _ONE,
    "rope_pct": _ONE,
    "use_dynamic_ntk": _OFF,
    "use_logn_attn": _OFF,
    "attn_temperature_tuning": _OFF,
    "llama_4_scaling": (),
    "llama_4_scaling_beta": (),
    "attn_logit_softcapping": _OFF,
    "final_logit_softcapping": _OFF,
    "attn_logit_softcap": _OFF,
    "final_logit_softcap": _OFF,
    "logits_soft_cap": _OFF,
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "lm_head_multiplier": _ONE,
    "embedding_multiplier": _ONE,
    "residual_multiplier": _ONE,
    "attention_multiplier": (),
    "attention_scale": (),
    "softmax_scale": (),
    "query_pre_attn_scalar": (),
    "scale_emb": _ONE,
    "scale_depth": (),
    "dim_model_base": (),
    "mup_enabled": _OFF,
    "use_mup": _OFF,
    "use_mup_embedding": _OFF,
    "clip_qkv": (),
    "attention_sink": _OFF,
    "attention_chunk_size": (),
    "interleaved_sliding_window": (),
    "sliding_window_pattern": (),
    "attention_window": (),
    "window_size": (),
    "hidden_activation": ("silu",),
    "mlp_activation": ("silu",),
    "mlp_hidden_act": ("silu",),
    "activation_function": ("silu",),
    "activation": ("silu", "swish", "swiglu"),
    "parallel_attn": _OFF,
    "use_parallel_residual": _OFF,
    "post_norm": _OFF,
    "use_post_norm": _OFF,
    "norm_after": _OFF,
    "norm_type": ("rms_norm", "rmsnorm", "RMSNorm", "rms"),
    "add_unit_offset": _OFF,
    "rms_norm_unit_offset": _OFF,
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "n_shared_experts": (0,),
    "num_experts_per_tok": _NO,
    "moe_intermediate_size": _NO,
    "kv_lora_rank": (0,),
    "q_lora_rank": (0,),
    "num_kv_shared_layers": (0,),
    "num_nextn_predict_layers": (0,),
    "vision_config": (),
    "audio_config": (),
    "text_config": ({},),
    "adapter_config": (),
}
"""Keys that change numbers, and the values that do not; null does not either."""

BIASES = (
    "attention_bias",
    "attention_out_bias",
    "mlp_bias",
    "bias",
    "qkv_bias",
    "use_bias",
    "use_qkv_bias",
    "add_bias_linear",
    "lm_head_bias",
)
"""Keys by which some family says that linears have a bias. The tensors decide, but vLLM makes
parameters for what these say, and where no tensor fills them they hold anything."""


def check_keys(raw: Mapping[str, Any], own: Iterable[str], qk_norm: bool, where: str) -> list[str]:
    """Refuses what would change the numbers.

    Args:
        raw: the content of ``config.json``.
        own: keys that the family reads beside those of all.
        qk_norm: whether the family has norms of q and k.
        where: the file, for errors.

    Returns:
        The keys that no table has.

    Raises:
        MsQuantError: a key has a value that is not neutral; names it and those that are.
    """
    own = set(own)
    head_dim = raw.get("head_dim")
    wanted: dict[str, tuple[Any, ...]] = {
        **NEUTRAL,
        **{key: _OFF for key in BIASES if key not in own},
        **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm"), (qk_norm,)),
        "kv_channels": () if head_dim is None else (head_dim,),
    }
    for key, neutral in wanted.items():
        if key not in own and not is_neutral(raw.get(key), neutral):
            expected = " or ".join(["no such key", *(repr(value) for value in neutral[:1])])
            raise BadFileError(
                f"{where}: {key} is {raw[key]!r:.80}, expected {expected}: it changes what the "
                "model computes, and is not computed here"
            )
    return sorted(raw.keys() - USED - HARMLESS - wanted.keys() - own)


def is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value says nothing; null never does. true is not the number 1."""
    return value is None or any(
        value == known and isinstance(value, bool) is isinstance(known, bool) for known in neutral
    )


def check_classes(raw: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuses classes that may compute something else than the family's own.

    Raises:
        MsQuantError: ``architectures`` or the custom code of ``auto_map`` names such a class.
    """
    named = raw.get("architectures")
    found = [("architectures", name) for name in named] if isinstance(named, list) else []
    custom = raw.get("auto_map")
    if custom is not None and not isinstance(custom, dict):
        raise BadFileError(f"{where}: auto_map is {custom!r:.80}, expected classes by their kind")
    for kind, place in (custom or {}).items():
        if kind.startswith("AutoModel"):
            text = place if isinstance(place, str) else repr(place)
            found.append((f"auto_map.{kind}", text.rpartition(".")[2]))
    known = {name.lower() for name in family.classes}  # LLaMAForCausalLM is older than Llama...
    for key, name in found:
        if not isinstance(name, str) or name.lower() not in known:
            raise BadFileError(
                f"{where}: {key} is {name!r:.80}, expected one of {', '.join(family.classes)}: "
                "another class may compute something else, and custom code is not read. If these "
                f"weights are an ordinary {family.base}'s, say so in config.json"
            )
