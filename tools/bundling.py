"""What the training of every bundled model shares: tokens, schedule, small files of a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

VOCABULARY, WINDOW = 2048, 256
END = "<|endoftext|>"


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one stream, an end token after each."""
    end = tokenizer.token_to_id(END)
    pieces = [encoding.ids + [end] for encoding in tokenizer.encode_batch(texts)]
    return np.array([i for piece in pieces for i in piece], np.int32)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 150) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def training_rows(stream: np.ndarray, seed: int, step: int, batch: int, length: int) -> np.ndarray:
    """The rows of a step: the same ones whenever training goes on from a step."""
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, len(stream) - length, batch)
    return np.stack([stream[s : s + length] for s in starts])


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_settings(out: Path, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Everything of a Hugging Face directory but its weights."""
    write_json(out / "config.json", config)
    write_json(
        out / "generation_config.json", {"do_sample": False, "eos_token_id": 0, "pad_token_id": 0}
    )
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": END,
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    )
