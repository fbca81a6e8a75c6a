"""What the cards of the small MoE models state: losses, load of the experts, accepted drafts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bundling import WINDOW
from small_moe import CausalLM
from torch import Tensor


def windows(stream: np.ndarray, batch: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows that do not overlap, and the token after each of theirs."""
    count = (len(stream) - 1) // WINDOW
    ids = stream[: count * WINDOW].reshape(count, WINDOW)
    targets = stream[1 : count * WINDOW + 1].reshape(count, WINDOW)
    for i in range(0, count, batch):
        yield tuple(torch.from_numpy(x[i : i + batch]).long() for x in (ids, targets))


def token_losses(logits: Tensor, targets: Tensor) -> np.ndarray:
    made = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none")
    return made.view(targets.shape).numpy()


def draft_figures(model: CausalLM, state: Tensor, logits: Tensor, targets: Tensor):
    """Losses of the MTP layer's tokens, and where it says what the main model says next.

    It drafts for all positions but the last, whose token would be the main model's in the next
    window.
    """
    drafted = model.draft(state, targets)[:, :-1]
    return token_losses(drafted, targets[:, 1:]), (drafted.argmax(-1) == logits[:, 1:].argmax(-1))


@torch.no_grad()
def measure(model: CausalLM, stream: np.ndarray) -> dict[str, Any]:
    losses, drafts, accepted = [], [], []
    counts = {i: torch.zeros(len(router.weight)) for i, router in model.routers().items()}
    for ids, targets in windows(stream):
        logits, state = model(ids)
        losses.append(token_losses(logits, targets))
        if model.drafts:
            draft, same = draft_figures(model, state, logits, targets)
            drafts.append(draft)
            accepted.append(same.numpy())
        for i, router in model.routers().items():
            counts[i] += router.counts
    made = np.concatenate(losses)
    figures = {
        "heldout_tokens": int(made.size),
        "heldout_loss": float(made.mean()),
        "heldout_perplexity": float(np.exp(made.mean())),
        "loss_positions_0_31": float(made[:, :32].mean()),
        "loss_positions_128_255": float(made[:, 128:].mean()),
        "tokens_per_expert": {str(i): [int(n) for n in c] for i, c in counts.items()},
    }
    if model.drafts:
        figures["draft_loss"] = float(np.concatenate(drafts).mean())
        figures["draft_acceptance"] = float(np.concatenate(accepted).mean())
    return figures


def load_rows(counts: dict[str, list[int]], drafting: int | None) -> str:
    """Rows of a table: least, mean and most tokens of an expert of each layer."""
    rows = []
    for layer, tokens in counts.items():
        name = f"{layer} (MTP)" if int(layer) == drafting else layer
        mean = sum(tokens) / len(tokens)
        rows.append(f"| {name} | {min(tokens):,} | {mean:,.0f} | {max(tokens):,} |")
    return "\n".join(rows)
