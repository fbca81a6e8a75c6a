"""Small random models, the same bytes on every machine: their numbers come from whole numbers."""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BUNDLED = Path(__file__).resolve().parents[1] / "models" / "stdlib-qwen3-6m"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
VOCAB = 2048  # of that tokenizer
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
OUTLIERS, FACTOR = 37, np.float32(8)
"""Every so-manieth channel of a norm is so much larger, so that smoothing has something to do."""
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TYPES = {"SmolLM3": "smollm3", "SeedOss": "seed_oss"}
CODE = {"auto_map": {"AutoConfig": "configuration_internlm3.InternLM3Config"}}


@dataclass(frozen=True)
class SmallModel:
    """A model to make.

    Attributes:
        base: what its class is called, as in ``LlamaForCausalLM``.
        dtype: of its weights.
        biases: members of a block that have one.
        qk_norm: whether heads of queries and keys have a norm.
        shards: number of its files.
        config: keys of config.json beside or instead of the common ones.
    """

    base: str
    dtype: str = "bfloat16"
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    shards: int = 1
    config: dict[str, Any] = field(default_factory=dict)


WIDE = {
    "hidden_size": 320,
    "intermediate_size": 320,
    "num_hidden_layers": 1,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
"""The smallest inside the limits of the UNZIP hardware on one rank."""
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ALL = (*QKV, "self_attn.o_proj", *MLP)
MODELS = {
    "qwen3": SmallModel("Qwen3", qk_norm=True),
    "qwen2": SmallModel("Qwen2", "float32", QKV, shards=2, config={"num_hidden_layers": 3}),
    "llama": SmallModel(
        "Llama",
        "float16",
        ALL,
        config={
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_scaling": LLAMA3,
        },
    ),
    "mistral": SmallModel("Mistral", config={"sliding_window": None}),
    "smollm3": SmallModel(
        "SmolLM3", config={"no_rope_layers": [1, 0], "tie_word_embeddings": True}
    ),
    "seed_oss": SmallModel("SeedOss", biases=QKV, config={"attention_bias": True}),
    "internlm3": SmallModel("InternLM3", config={"qkv_bias": False, "bias": False, **CODE}),
    "wide": SmallModel("Qwen3", qk_norm=True, config=WIDE),
    "wide_qwen2": SmallModel("Qwen2", biases=QKV, config=WIDE),
}


def write_model(directory: Path, model: SmallModel) -> None:
    """Makes a Hugging Face checkpoint with the tokenizer of the bundled model."""
    config = _config(model)
    tensors = {
        name: _values(name, shape).astype(DTYPES[model.dtype])
        for name, shape in _shapes(model, config).items()
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        shutil.copyfile(BUNDLED / name, directory / name)
    if model.shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    files = {}
    for number in range(model.shards):  # every block is spread over all of them
        file = f"model-{number + 1:05d}-of-{model.shards:05d}.safetensors"
        mine = list(tensors)[number :: model.shards]
        save_file({name: tensors[name] for name in mine}, directory / file)
        files |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _config(model: SmallModel) -> dict[str, Any]:
    return {
        "architectures": [f"{model.base}ForCausalLM"],
        "model_type": TYPES.get(model.base, model.base.lower()),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "torch_dtype": model.dtype,
        **model.config,
    }


def _shapes(model: SmallModel, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inter, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    outputs = dict(zip(ALL, (q, kv, kv, hidden, inter, inter, hidden), strict=True))
    inputs = {"self_attn.o_proj": q, "mlp.down_proj": inter}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, hidden)}
    for index in range(config["num_hidden_layers"]):
        block = f"model.layers.{index}."
        shapes[f"{block}input_layernorm.weight"] = (hidden,)
        shapes[f"{block}post_attention_layernorm.weight"] = (hidden,)
        if model.qk_norm:
            shapes[f"{block}self_attn.q_norm.weight"] = (dim,)
            shapes[f"{block}self_attn.k_norm.weight"] = (dim,)
        for member in ALL:
            shapes[f"{block}{member}.weight"] = (outputs[member], inputs.get(member, hidden))
            if member in model.biases:
                shapes[f"{block}{member}.bias"] = (outputs[member],)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, hidden)
    return shapes


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32, nearly normal: sums of eight bytes of PCG64, whose stream never changes."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    sums = raw.astype("<u8").view(np.int8).reshape(-1, 8).sum(axis=1, dtype=np.int32)
    noise = sums.astype(np.float32).reshape(shape) * np.float32(2**-8)
    if not name.endswith("norm.weight"):
        return noise * np.float32(0.1 if len(shape) == 1 else shape[1] ** -0.5)
    gains = 1 + np.float32(0.1) * noise
    if "layernorm" in name:
        gains[::OUTLIERS] *= FACTOR
    return gains
