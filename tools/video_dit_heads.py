"""Where each head of the bundled video diffusion transformer looks, on held-out clips."""

from __future__ import annotations

import numpy as np
import torch
from moving_shapes import FRAMES, GRID, TEXT, TOKENS
from torch import Tensor
from torch_video_dit import VideoDiT

TIMES = (0.9, 0.5, 0.2)
LEAST = 0.5
"""Of what a head's video tokens look at, so much makes the head's name."""


def places() -> dict[str, np.ndarray]:
    """What a query of the video may look at, bool (video queries, tokens), by name."""
    frame, down, across = (at.ravel() for at in np.indices(GRID))
    near = (np.abs(down[:, None] - down) <= 1) & (np.abs(across[:, None] - across) <= 1)
    same = (down[:, None] == down) & (across[:, None] == across)
    video = {
        "own_frame": frame[:, None] == frame,
        "place": near,
        "exact_place": same,
        "first_frame": np.broadcast_to(frame == 0, (TOKENS, TOKENS)),
    }
    found = {name: np.pad(kept, ((0, 0), (TEXT, 0))) for name, kept in video.items()}
    found["words"] = np.broadcast_to(np.arange(TEXT + TOKENS) < TEXT, (TOKENS, TEXT + TOKENS))
    return found


@torch.no_grad()
def probabilities(model: VideoDiT, tokens: Tensor, words: Tensor, eps: Tensor) -> list[Tensor]:
    """Probabilities of each block, (times x clips, heads, video queries, tokens)."""
    found: list[list[Tensor]] = []
    for time in TIMES:
        for block in model.blocks:
            block.attn.seen = []
        model((1 - time) * tokens + time * eps, torch.full((len(tokens),), time), words)
        found.append([block.attn.seen[0][:, :, TEXT:] for block in model.blocks])
    for block in model.blocks:
        block.attn.seen = None
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def head_rows(seen: list[Tensor]) -> list[dict[str, float | int | str]]:
    """For each head the mean probability of each kind of place, and what it is called."""
    masks, rows = places(), []
    for block, all_heads in enumerate(seen):
        for head, p in enumerate(all_heads.unbind(1)):
            row = {
                name: float((p * torch.from_numpy(kept.astype(np.float32))).sum(-1).mean())
                for name, kept in masks.items()
            }
            columns = p[..., TEXT:].mean(1).sort(-1, descending=True).values
            row["eighth_of_columns"] = float(columns[:, : TOKENS // FRAMES].sum(-1).mean())
            rows.append({"block": block, "head": head, "name": _name(row), **row})
    return rows


def chance() -> dict[str, float]:
    """The same of a head that looks everywhere."""
    found = {name: float(kept.mean()) for name, kept in places().items()}
    return {**found, "eighth_of_columns": TOKENS / FRAMES / (TOKENS + TEXT)}


def _name(row: dict[str, float]) -> str:
    kinds = {
        "place": "temporal",
        "own_frame": "spatial",
        "words": "words",
        "eighth_of_columns": "columns",
    }
    largest = max(kinds, key=lambda name: row[name])
    return kinds[largest] if row[largest] >= LEAST else "mixed"
