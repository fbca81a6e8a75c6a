"""Muon: momentum whose matrices are made orthogonal, for one matrix and for stacks of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Singular values near 1 for each matrix of the last two axes (Newton-Schulz, quintic)."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Updates have the size of AdamW's (0.2 a member in the mean square), and its kind of decay."""

    def __init__(self, parameters: Iterable[Tensor], decay: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": 0.0, "weight_decay": decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                made = orthogonal(p.grad.lerp(state["momentum"], group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(made, alpha=-0.2 * group["lr"] * max(p.shape[-2:]) ** 0.5)
