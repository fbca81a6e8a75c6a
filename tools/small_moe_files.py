"""The small MoE models on disk: their settings, and their tensors as published ones have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from small_moe import CausalLM
from torch import Tensor

COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 1024,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 2048,
}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 64,
    "hidden_size": 192,
    "intermediate_size": 512,
    "max_window_layers": 3,
    "mlp_only_layers": [],
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rope_scaling": None,
    "router_aux_loss_coef": 0.005,
    "sliding_window": None,
    "use_sliding_window": False,
    **COMMON,
}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 1,
    "hidden_size": 128,
    "intermediate_size": 384,
    "kv_lora_rank": 96,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rope_interleave": True,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "v_head_dim": 32,
    **COMMON,
}
CONFIGS: dict[str, dict[str, Any]] = {
    config["model_type"]: dict(sorted(config.items())) for config in (QWEN3_MOE, DEEPSEEK_V3)
}
FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def published(model: CausalLM) -> dict[str, Tensor]:
    """All tensors per expert, in bfloat16; the router's bias stays float32."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(FUSED):
            tensors[name] = tensor
            continue
        prefix = name.rpartition(".")[0]
        for i, expert in enumerate(tensor):
            if name.endswith("down_proj"):
                tensors[f"{prefix}.{i}.down_proj.weight"] = expert
            else:
                gate, up = expert.chunk(2)
                tensors[f"{prefix}.{i}.gate_proj.weight"] = gate
                tensors[f"{prefix}.{i}.up_proj.weight"] = up
    for i in range(model.drafts):
        prefix = f"model.layers.{model.config['num_hidden_layers'] + i}"
        tensors[f"{prefix}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors[f"{prefix}.shared_head.head.weight"] = tensors["lm_head.weight"]
    return {name: stored(name, tensor) for name, tensor in sorted(tensors.items())}


def stored(name: str, tensor: Tensor) -> Tensor:
    dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
    return tensor.detach().to(dtype, copy=True).contiguous()


def save_weights(model: CausalLM, path: Path) -> None:
    save_file(published(model), path, metadata={"format": "pt"})
    path.chmod(0o644)


def load_weights(model: CausalLM, path: Path) -> None:
    """Puts what a file holds into the model, for measuring what was stored."""
    tensors = load_file(path)
    for name, target in model.state_dict().items():
        target.copy_(fused(tensors, name) if name.endswith(FUSED) else tensors[name])


def fused(tensors: dict[str, Tensor], name: str) -> Tensor:
    prefix, _, kind = name.rpartition(".")
    members = ("down_proj",) if kind == "down_proj" else ("gate_proj", "up_proj")
    experts = sum(key.startswith(f"{prefix}.") and "down_proj" in key for key in tensors)
    return torch.stack(
        [
            torch.cat([tensors[f"{prefix}.{i}.{member}.weight"] for member in members])
            for i in range(experts)
        ]
    )
