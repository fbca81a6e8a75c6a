"""Reads config.json of what this project writes with the transformers that is installed.

Run it under transformers 4 and 5 and compare: every line must be the same. It builds the rotary
embedding of the model's own class, so what is compared is what a runtime computes with.

    python tools/check_config_spellings.py DIRECTORY ...
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path

import transformers
from transformers import AutoConfig


def rotary(config) -> tuple[str, str]:
    """Digest of the frequencies to seven digits, and the factor on cos and sin."""
    kind = type(config).__name__.removesuffix("Config")
    folder = {"SmolLM3": "smollm3", "SeedOss": "seed_oss"}.get(kind, kind.lower())
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    made = getattr(module, f"{kind}RotaryEmbedding")(config)
    text = " ".join(f"{value:.6e}" for value in made.inv_freq.double().tolist())
    return hashlib.sha256(text.encode()).hexdigest()[:12], f"{made.attention_scaling:.6f}"


def windows(config) -> list[str]:
    """What each layer sees, as far as the config says."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return sorted(set(kinds))
    window = getattr(config, "sliding_window", None)
    flagged = getattr(config, "use_sliding_window", True)
    return [f"window {window}" if window and flagged else "full_attention"]


def main() -> None:
    print(f"transformers {transformers.__version__}", file=sys.stderr)
    for directory in map(Path, sys.argv[1:]):
        config = AutoConfig.from_pretrained(directory)
        dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        line = {
            "rotary": rotary(config),
            "dtype": str(dtype).removeprefix("torch."),
            "eos": config.eos_token_id,
            "tied": config.tie_word_embeddings,
            "kv_heads": config.num_key_value_heads,
            "windows": windows(config),
        }
        print(directory.name, json.dumps(line))


if __name__ == "__main__":
    main()
