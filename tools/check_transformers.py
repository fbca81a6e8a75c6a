"""Compares our logits with those transformers computes for a model directory.

Needs torch and transformers, so it runs in two steps. Where those are installed, write ids:

    python tools/check_transformers.py MODEL_DIR --text "def main():" --ids ids.npy

then save the float32 logits of ``forward(model, ids)`` as ours.npy where MindSpore is
installed, and compare:

    python tools/check_transformers.py MODEL_DIR --ids ids.npy --ours ours.npy
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def reference_logits(model_dir: str, ids: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(
            input_ids=torch.from_numpy(ids.astype(np.int64)), use_cache=False
        ).logits.numpy()


def compare(ours: np.ndarray, theirs: np.ndarray, limit: float) -> bool:
    """Prints the largest difference; true if it is within ``limit`` of the largest logit."""
    if ours.shape != theirs.shape:
        raise SystemExit(f"our logits have the shape {ours.shape}, expected {theirs.shape}")
    span, difference = np.abs(theirs).max(), np.abs(ours - theirs).max()
    same = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    print(f"max difference {difference:.2e}, max |logit| {span:.2f}, same next token {same:.2%}")
    return bool(difference <= limit * span)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir")
    parser.add_argument("--ids", required=True, help=".npy of (B, S); written when --text is given")
    parser.add_argument("--text", help="text to tokenize into --ids")
    parser.add_argument("--ours", help=".npy of our float32 logits (B, S, vocab)")
    parser.add_argument("--limit", type=float, default=1e-4, help="share of the largest logit")
    args = parser.parse_args()
    if args.text is not None:
        tokens = AutoTokenizer.from_pretrained(args.model_dir)(args.text)["input_ids"]
        np.save(args.ids, np.array([tokens], np.int64))
    theirs = reference_logits(args.model_dir, np.load(args.ids))
    return 0 if args.ours is None or compare(np.load(args.ours), theirs, args.limit) else 1


if __name__ == "__main__":
    sys.exit(main())
