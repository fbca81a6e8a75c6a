"""What is written about the trained video diffusion transformer: weights, card, golden outputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundling import write_json
from safetensors.torch import save_file
from torch import Tensor
from torch_video_dit import VideoDiT

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from moving_shapes import clips, noise, to_tokens  # noqa: E402
from video_dit_heads import TIMES, chance, head_rows, probabilities  # noqa: E402

HELD_OUT, HELD_OUT_CLIPS = 10**6, 32
"""Seed of held-out clips; training draws from (seed, step)."""
COLUMNS = ("place", "exact_place", "own_frame", "first_frame", "words", "eighth_of_columns")


def velocity_loss(
    model: VideoDiT, tokens: Tensor, words: Tensor, at: Tensor, eps: Tensor
) -> Tensor:
    """Mean squared error of the velocity; rectified flow: x = (1 - t) clip + t noise."""
    t = at[:, None, None]
    return torch.mean((model((1 - t) * tokens + t * eps, at, words) - (eps - tokens)) ** 2)


@torch.no_grad()
def velocity_losses(model: VideoDiT, tokens: Tensor, words: Tensor, eps: Tensor) -> list[float]:
    """Mean squared error of the velocity of held-out clips, at each of ``TIMES``."""
    every = (torch.full((len(tokens),), time) for time in TIMES)
    return [float(velocity_loss(model, tokens, words, at, eps)) for at in every]


@torch.no_grad()
def golden(model: VideoDiT, file: Path) -> None:
    """Two noisy clips at two times, and their velocities; inputs are exact in float16."""
    videos, words = clips(2, HELD_OUT + 1)
    times = np.array([0.75, 0.25], np.float32)
    at = times[:, None, None]
    x = ((1 - at) * to_tokens(videos) + at * noise(2, HELD_OUT + 1)).astype(np.float16)
    inputs = (torch.from_numpy(x).float(), torch.from_numpy(times), torch.from_numpy(words))
    np.savez(file, x=x, time=times, words=words, velocity=model(*inputs).numpy())


def write_model(model: VideoDiT, out: Path, report: dict[str, Any], golden_file: Path) -> None:
    """Writes the model's directory, whose card states what the weights do, and golden outputs."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    write_json(out / "config.json", model.config)
    golden(model, golden_file)
    videos, words = clips(HELD_OUT_CLIPS, HELD_OUT)
    held_out = (
        torch.from_numpy(to_tokens(videos)),
        torch.from_numpy(words),
        torch.from_numpy(noise(HELD_OUT_CLIPS, HELD_OUT)),
    )
    losses = velocity_losses(model, *held_out)
    seen = probabilities(model, *(part[: HELD_OUT_CLIPS // 4] for part in held_out))
    report |= {
        "torch": torch.__version__,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "held_out_clips": HELD_OUT_CLIPS,
        "held_out_loss": {str(t): round(x, 4) for t, x in zip(TIMES, losses, strict=True)},
        "chance": {name: round(x, 3) for name, x in chance().items()},
        "heads": [
            {k: round(x, 3) if isinstance(x, float) else x for k, x in row.items()}
            for row in head_rows(seen)
        ],
    }
    write_json(out / "training.json", report)
    card = Path(__file__).with_name("video_dit_card.md").read_text(encoding="utf-8")
    (out / "README.md").write_text(filled(card, report, out), encoding="utf-8")
    print(json.dumps(report, indent=2))


def filled(card: str, report: dict[str, Any], out: Path) -> str:
    """The card with the figures of a report."""
    size = (out / "model.safetensors").stat().st_size / 1e6
    losses = {f"loss_{time[2:]}": loss for time, loss in report["held_out_loss"].items()}
    lines = [
        f"| {row['block']}.{row['head']} | {row['name']} | " + _figures(row)
        for row in report["heads"]
    ]
    table = "\n".join([*lines, "| a head that looks everywhere | | " + _figures(report["chance"])])
    return card.format(**report, **losses, size=size, table=table)


def _figures(row: dict[str, Any]) -> str:
    return " | ".join(f"{row[name]:.2f}" for name in COLUMNS) + " |"
