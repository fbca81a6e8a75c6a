"""Compares the small MoE models, as stored, with what transformers makes of the same files.

    python tools/check_small_moe.py models/stdlib-deepseek --text models/text/heldout.txt

Needs torch and transformers 5.24. The MTP layer is compared with the one that transformers drafts
with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from bundling import WINDOW
from small_moe import CausalLM
from small_moe_files import load_weights
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel


def difference(name: str, ours: Tensor, theirs: Tensor) -> bool:
    """Prints how far apart logits are; true if by float32 rounding only."""
    apart, span = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    print(f"{name}: max difference {apart:.2e}, max |logit| {span:.2f}")
    return apart < 1e-4 * span


def their_drafts(reference: AutoModelForCausalLM, ids: Tensor, following: Tensor) -> Tensor:
    # transformers knows the MTP layers of DeepSeek's own depth alone, 61.
    reference._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{reference.config.num_hidden_layers}\."
    ]
    draft = MtpModel.from_pretrained(reference)
    state = reference.model(input_ids=ids, use_cache=False).last_hidden_state
    embedded = reference.model.embed_tokens(following)
    places = torch.arange(1, WINDOW + 1)[None]
    causal = torch.full((WINDOW, WINDOW), float("-inf")).triu(1)[None, None]
    made = draft.layers[0](
        inputs_embeds=embedded,
        previous_hidden_state=state,
        position_embeddings=reference.model.rotary_emb(embedded, places),
        attention_mask=causal,
        position_ids=places,
        cache=None,
    )
    return reference.lm_head(made)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    tokens = torch.tensor(tokenizer.encode(args.text.read_text()).ids[: args.windows * WINDOW + 1])
    ids, following = tokens[:-1].view(-1, WINDOW), tokens[1:].view(-1, WINDOW)
    ours = CausalLM(json.loads((args.model / "config.json").read_text()))
    load_weights(ours, args.model / "model.safetensors")
    reference = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    logits, state = ours(ids)
    same = difference("logits", logits, reference(input_ids=ids, use_cache=False).logits)
    if ours.drafts:
        drafted = their_drafts(reference, ids, following)
        same &= difference("MTP logits", ours.draft(state, following), drafted)
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
