"""Trains the bundled video diffusion transformer, models/moving-shapes-dit.

    python tools/train_video_dit.py --out models/moving-shapes-dit --steps 1600

It needs torch, which nothing that this project installs does, and safetensors. The network is that
of examples/video_dit.py, the videos are those of examples/moving_shapes.py.

Why not the Cells of examples/video_dit.py: trained with MindSpore 2.10 on a CPU a step takes 2.2 to
3.9 s after 40 s of compiling, with torch on the same busy cores 0.7 s.

Checkpoints itself every 100 steps and goes on from there when started again, with another number
of steps too; what is left of the schedule then ends there.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from bundling import learning_rate
from muon import Muon
from torch_video_dit import CONFIG, VideoDiT
from video_dit_files import ROOT, clips, to_tokens, velocity_loss, write_model

MUON, DECAY = 2, 0.02
"""Learning rate of Muon over that of AdamW, and its weight decay."""


def times(rng: np.random.Generator, count: int) -> np.ndarray:
    """Times about as the sigmoid of normal numbers, one in each of ``count`` equal shares."""
    share = (np.arange(count) + rng.random(count)) / count
    return (1 / (1 + (1 / np.clip(share, 1e-4, 1 - 1e-4) - 1) ** 0.6)).astype(np.float32)


def optimizers_for(model: VideoDiT) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and of feed-forward, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside = "attn.to_" in name or "ffn." in name
        (matrices if inside and parameter.ndim == 2 else others).append(parameter)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    return [adam, Muon(matrices, DECAY)]


class Training:
    """A network, its optimizers and running mean, and how far they are; on disk now and then."""

    def __init__(self, args: argparse.Namespace, file: Path):
        self.args, self.file = args, file
        torch.manual_seed(args.seed)
        self.model = VideoDiT(CONFIG)
        self.optimizers = optimizers_for(self.model)
        self.mean = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.step, self.seconds, self.shown = 0, 0.0, math.nan
        if file.exists():
            state = torch.load(file)
            self.model.load_state_dict(state["model"])
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
            self.mean = state["mean"]
            self.step, self.seconds, self.shown = (state[n] for n in ("step", "seconds", "shown"))
            print(f"going on from step {self.step}", file=sys.stderr)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "mean": self.mean,
            "step": self.step,
            "seconds": self.seconds,
            "shown": self.shown,
        }
        following = self.file.with_suffix(".next")
        torch.save(state, following)
        following.replace(self.file)

    def one_step(self) -> None:
        args = self.args
        rate = learning_rate(self.step, args.steps, args.learning_rate)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (MUON if isinstance(optimizer, Muon) else 1)
        videos, words = clips(args.batch, (args.seed, self.step))
        rng = np.random.default_rng((args.seed, self.step, 1))
        at = torch.from_numpy(times(rng, args.batch))
        tokens = torch.from_numpy(to_tokens(videos))
        eps = torch.from_numpy(rng.normal(size=tokens.shape).astype(np.float32))
        loss = velocity_loss(self.model, tokens, torch.from_numpy(words), at, eps)
        self.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.mean[name].lerp_(parameter, 1 - keep)
        now = loss.item()
        self.shown = now if math.isnan(self.shown) else 0.98 * self.shown + 0.02 * now
        self.step += 1

    def run(self) -> None:
        started, before = time.process_time(), self.seconds
        while self.step < self.args.steps:
            self.one_step()
            self.seconds = before + time.process_time() - started
            last = self.step == self.args.steps
            if self.step % 25 == 0 or last:
                text = f"step {self.step} loss {self.shown:.4f} {self.seconds:.0f} CPU s"
                print(text, file=sys.stderr, flush=True)
            if self.step % 100 == 0 or last:
                self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=None, help="where training state is kept")
    args = parser.parse_args()
    torch.set_num_threads(1)  # two would wait for each other at each operation
    out, work = args.out, args.work or args.out / "work"
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    training = Training(args, work / "training_state.pt")
    training.run()
    report = {
        "command": f"python tools/train_video_dit.py --out models/{out.name} --steps {args.steps}",
        "seed": args.seed,
        "steps": args.steps,
        "batch": args.batch,
        "learning_rate": args.learning_rate,
        "cpu_minutes": round(training.seconds / 60, 1),
        "training_loss": round(training.shown, 4),
    }
    training.model.load_state_dict(training.mean, strict=False)
    write_model(training.model, out, report, ROOT / "tests" / "golden" / "video_dit.npz")


if __name__ == "__main__":
    main()
