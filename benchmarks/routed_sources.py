"""Random checkpoints with experts, written some rows at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ms_quant.files.writer import Array, TensorPlan, write_file
from ms_quant.models.config import parse_config

BUNDLED = Path(__file__).parent.parent / "models" / "stdlib-qwen3-6m"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
PIECE = 1 << 22  # values at a time
SPREAD = 0.02  # of the weights

QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": False,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_R1: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "vocab_size": 1024,
    "max_position_embeddings": 163840,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "num_nextn_predict_layers": 0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""DeepSeek-R1 but for its depth, its vocabulary, and that it has 16 of 256 experts in 4 groups."""


def write_source(directory: Path, raw: dict[str, Any]) -> int:
    """A checkpoint in bfloat16 with random weights, and the bundled model's tokenizer.

    Args:
        directory: to make.
        raw: its ``config.json``.

    Returns:
        int, the bytes of the tensors.
    """
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    for name in TOKENIZER:
        shutil.copy(BUNDLED / name, directory)
    rng = np.random.default_rng(0)
    plans = [
        TensorPlan(name, FLOAT32 if name.endswith("correction_bias") else BFLOAT16, shape)
        for name, shape in parse_config(raw).parameter_shapes().items()
    ]

    def value(plan: TensorPlan) -> Array:
        if len(plan.shape) > 1:
            return _rows(plan, rng)
        if plan.dtype == FLOAT32:
            return rng.standard_normal(plan.shape, np.float32) * np.float32(SPREAD)
        return np.ones(plan.shape, plan.dtype)

    write_file(directory / "model.safetensors", plans, value, {"format": "pt"})
    return sum(plan.bytes for plan in plans)


def _rows(plan: TensorPlan, rng: np.random.Generator) -> Iterator[np.ndarray]:
    rows, columns = plan.shape
    step = max(1, PIECE // columns)
    for start in range(0, rows, step):
        shape = min(step, rows - start), columns
        yield (rng.standard_normal(shape, np.float32) * np.float32(SPREAD)).astype(plan.dtype)


def write_tokens(path: Path, vocabulary: int, windows: int, length: int) -> None:
    """Random tokens to calibrate with."""
    tokens = np.random.default_rng(1).integers(0, vocabulary, (windows, length), dtype=np.int32)
    np.savez(path, tokens=tokens)
