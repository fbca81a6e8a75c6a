"""Small models with experts: their configs, and random weights for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ms_quant.models.config import parse_config

DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_theta": 10000,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 1,
    "torch_dtype": "bfloat16",
}
QWEN: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}


def routed_tensors(raw: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights, float32; some channels of norms are large, biases of routers are small."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in parse_config(dict(raw)).parameter_shapes().items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = rng.normal(0, 0.1, shape).astype(np.float32)
        elif len(shape) == 1:
            tensors[name] = np.exp(rng.normal(0, 0.5, shape)).astype(np.float32)
        else:
            tensors[name] = (rng.normal(size=shape) / np.sqrt(shape[1])).astype(np.float32)
    return tensors


def save_routed(directory: Path, raw: Mapping[str, Any], seed: int = 0) -> Path:
    """A float checkpoint of random weights, without a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = routed_tensors(raw, seed)
    stored = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.astype(BF16)
        for name, tensor in tensors.items()
    }
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(dict(raw)))
    return directory


BF16 = ml_dtypes.bfloat16
