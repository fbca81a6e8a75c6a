"""Writes tests/golden/logits: the logits transformers computes for small random decoders.

Needs torch and transformers, which nothing else in this project does:

    python tools/make_golden_logits.py [NAME ...]

Each ``.npz`` holds ``config`` (the bytes of the config.json that transformers saved), ``seed``,
``checksum`` of the weights, ``right`` and ``left`` (logits by padding side), ``versions``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from golden_weights import SIDES, batch, checksum, kept, random_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

TARGET = Path(__file__).resolve().parent.parent / "tests" / "golden" / "logits"

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "attn_implementation": "eager",
}


def rope(kind: str, theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


QWEN_EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 24}
LATENT = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
DEEPSEEK_ROPE = rope(
    "yarn",
    factor=40.0,
    original_max_position_embeddings=16,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_gqa": ("llama", {"rope_parameters": rope("default", 500.0)}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2}),
    "llama_linear": ("llama", {"rope_parameters": rope("linear", factor=4.0)}),
    "llama_dynamic": (
        "llama",
        {"rope_parameters": rope("dynamic", factor=2.0), "max_position_embeddings": 24},
    ),
    "llama_dynamic_short": ("llama", {"rope_parameters": rope("dynamic", factor=2.0)}),
    "llama_yarn": (
        "llama",
        {
            "rope_parameters": rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                attention_factor=1.3,
                beta_fast=2.0,
                beta_slow=0.25,
            ),
            "max_position_embeddings": 256,
        },
    ),
    "llama_yarn_mscale": (
        "llama",
        {
            "rope_parameters": rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                mscale=1.5,
                mscale_all_dim=0.7,
                beta_fast=2.0,
                beta_slow=0.25,
                truncate=False,
            ),
            "max_position_embeddings": 256,
        },
    ),
    "llama3": (
        "llama",
        {
            "rope_parameters": rope(
                "llama3",
                1000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
            "max_position_embeddings": 256,
        },
    ),
    "qwen2_tied_yarn": (
        "qwen2",
        {
            "tie_word_embeddings": True,
            "rope_parameters": rope(
                "yarn", 1000000.0, factor=4.0, original_max_position_embeddings=32
            ),
            "max_position_embeddings": 128,
        },
    ),
    "qwen2_one_kv_head": ("qwen2", {"num_key_value_heads": 1, "rms_norm_eps": 1e-6}),
    "qwen3": ("qwen3", {"head_dim": 32, "rope_parameters": rope("default", 1000000.0)}),
    "qwen3_biases_tied": (
        "qwen3",
        {
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-2,
            "eos_token_id": [1, 2],
        },
    ),
    "mistral": (
        "mistral",
        {"head_dim": 32, "sliding_window": None, "rope_parameters": rope("default", 1000000.0)},
    ),
    "mistral_long_window": ("mistral", {"sliding_window": 64, "tie_word_embeddings": True}),
    "qwen2_flat_windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ),
    "smollm3_rotated": (
        "smollm3",
        {
            "no_rope_layers": [1, 1],
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": rope("default", 5000000.0),
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3_yarn": (
        "smollm3",
        {
            "no_rope_layer_interval": 3,
            "rope_parameters": rope("yarn", factor=2.0, original_max_position_embeddings=32),
            "pad_token_id": 0,
        },
    ),
    "smollm3": (
        "smollm3",
        {
            "num_hidden_layers": 5,
            "rope_parameters": rope("default", 5000000.0),
            "pad_token_id": 0,
            "use_sliding_window": True,
            "sliding_window": 64,
        },
    ),
    "smollm3_unrotated": ("smollm3", {"no_rope_layers": [0, 1], "pad_token_id": 0}),
    "seed_oss": (
        "seed_oss",
        {"head_dim": 8, "attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    ),
    "seed_oss_biases": (
        "seed_oss",
        {
            "head_dim": 32,
            "attention_bias": False,
            "attention_out_bias": True,
            "mlp_bias": True,
            "residual_dropout": 0.5,
            "rope_parameters": rope("linear", 10000000.0, factor=2.0),
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **QWEN_EXPERTS,
            "shared_expert_intermediate_size": 40,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "qkv_bias": True,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **QWEN_EXPERTS,
            "head_dim": 32,
            "norm_topk_prob": True,
            "num_hidden_layers": 4,
            "mlp_only_layers": [2],
            "rope_parameters": rope("default", 1000000.0),
        },
    ),
    "qwen3_moe_steps": (
        "qwen3_moe",
        {
            **QWEN_EXPERTS,
            "head_dim": 8,
            "decoder_sparse_step": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "rope_parameters": DEEPSEEK_ROPE}),
    "deepseek_v3_mscale": (
        "deepseek_v3",
        {
            **LATENT,
            "rope_parameters": {**DEEPSEEK_ROPE, "mscale": 0.9, "mscale_all_dim": 0.707},
            "norm_topk_prob": False,
            "n_shared_experts": 1,
            "attention_bias": True,
        },
    ),
    "deepseek_v3_plain": (
        "deepseek_v3",
        {
            **LATENT,
            "q_lora_rank": None,
            "rope_interleave": False,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "rope_parameters": rope("default", 50000.0),
            "rms_norm_eps": 1e-2,
        },
    ),
    "glm4": (
        "glm4",
        {
            "head_dim": 16,
            "rope_parameters": rope("default", partial_rotary_factor=0.5),
            "pad_token_id": 0,
        },
    ),
    "glm4_yarn": (
        "glm4",
        {
            "head_dim": 32,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-2,
            "rope_parameters": rope(
                "yarn",
                factor=2.0,
                original_max_position_embeddings=32,
                partial_rotary_factor=0.25,
            ),
            "pad_token_id": 0,
        },
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {"rope_parameters": rope("default", 1000000.0, mrope_section=[2, 3, 3])},
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {
            "head_dim": 32,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": rope(
                "default", 5000000.0, mrope_section=[8, 4, 4], mrope_interleaved=True
            ),
        },
    ),
}


VISION = {
    "qwen2_5_vl": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64},
    "qwen3_vl": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64},
}
"""What sees images, which no logits of a text depend on."""


def build(model_type: str, changes: dict[str, Any], seed: int):
    """A transformers model with the weights of a seed, and those weights."""
    keys, maker = {**SHAPE, **changes}, AutoModelForCausalLM
    if model_type.endswith("_vl"):
        keys = {"text_config": keys, "vision_config": VISION[model_type]}
        keys["tie_word_embeddings"] = changes.get("tie_word_embeddings", False)
        maker = AutoModelForImageTextToText
    config = AutoConfig.for_model(model_type, **keys)
    model = maker.from_config(config, attn_implementation="eager").eval().float()
    tensors = {
        name.replace("model.language_model.", "model."): parameter
        for name, parameter in model.named_parameters()
        if not name.startswith("model.visual.")
    }
    tensors |= {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    parts = {name: published(name, tuple(tensor.shape)) for name, tensor in tensors.items()}
    shapes = {key: shape for found in parts.values() for key, shape in found.items()}
    weights = random_weights(shapes, seed)
    with torch.no_grad():
        for name, tensor in tensors.items():
            arrays = np.concatenate([weights[part].ravel() for part in parts[name]])
            tensor.copy_(torch.from_numpy(arrays.reshape(tensor.shape)))
    return model, weights


def published(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensors of checkpoints that a parameter is stacked from, in order.

    transformers 5 holds all experts of a layer in one tensor, gate before up.
    """
    module, _, kind = name.rpartition(".experts.")
    if not module:
        return {name: shape}
    both = kind.startswith("gate_up_proj")
    count, rows, columns = shape
    rows //= 2 if both else 1
    names = ("gate_proj", "up_proj") if both else ("down_proj",)
    return {
        f"{module}.experts.{e}.{part}.weight": (rows, columns)
        for e in range(count)
        for part in names
    }


def saved_config(model) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        return (Path(folder) / "config.json").read_bytes()


def run(model, side: str, positions: str = "range") -> np.ndarray:
    """Logits at the compared positions, float32 (or whatever the model's type is)."""
    ids, mask = batch(model.config.get_text_config().vocab_size, side)
    if positions == "range":
        place = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
    else:  # what transformers' generate() does for padding on the left
        place = np.maximum(np.cumsum(mask, 1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(place),
            use_cache=False,
        )
    return kept(out.logits.numpy(), mask)


def main(chosen: list[str]) -> None:
    torch.set_num_threads(1)
    TARGET.mkdir(parents=True, exist_ok=True)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    for seed, (name, (model_type, changes)) in enumerate(CASES.items(), start=100):
        if chosen and name not in chosen:
            continue
        model, weights = build(model_type, changes, seed)
        logits = {side: run(model, side) for side in SIDES}
        shift = np.abs(run(model, "left", "cumulative") - logits["left"]).max()
        span = max(np.abs(value).max() for value in logits.values())
        np.savez_compressed(
            TARGET / f"{name}.npz",
            config=np.frombuffer(saved_config(model), np.uint8),
            seed=seed,
            checksum=checksum(weights),
            versions=versions,
            **logits,
        )
        keys = json.loads(saved_config(model)).keys()
        print(f"{name}: max |logit| {span:.3f}, positions shifted {shift:.1e}, {len(keys)} keys")


if __name__ == "__main__":
    main(sys.argv[1:])
