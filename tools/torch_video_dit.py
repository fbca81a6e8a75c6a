"""The network of examples/video_dit.py in PyTorch, with the same names of parameters."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG = {
    "model_type": "video_dit",
    "hidden_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "ffn_size": 256,
    "frequency_size": 64,
    "latent_shape": [8, 8, 8],
    "patch_values": 12,
    "text_tokens": 4,
    "vocabulary": 10,
    "rope_axes": [4, 6, 6],
    "rope_top": math.pi / 2,
    "rope_theta": 16.0,
    "norm_eps": 1e-6,
}


def rotary_angles(config: dict) -> np.ndarray:
    """Angle of each pair of channels of each token, (text + video, head size / 2), 0 for text."""
    parts, at = [], np.indices(config["latent_shape"]).reshape(3, -1)
    for size, places in zip(config["rope_axes"], at, strict=True):
        pairs = size // 2
        speed = config["rope_top"] * config["rope_theta"] ** (-np.arange(pairs) / pairs)
        parts.append(places[:, None] * speed)
    video = np.concatenate(parts, axis=1)
    return np.pad(video, ((config["text_tokens"], 0), (0, 0)))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class Attention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        size = config["hidden_size"]
        self.heads, self.eps = config["num_heads"], config["norm_eps"]
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(size, size) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(size // self.heads, self.eps) for _ in range(2))
        self.seen: list[Tensor] | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        q, k = rotated(self.norm_q(q), cos, sin), rotated(self.norm_k(k), cos, sin)
        if self.seen is not None:
            self.seen.append(torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.up = nn.Linear(config["hidden_size"], config["ffn_size"])
        self.down = nn.Linear(config["ffn_size"], config["hidden_size"])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        size = config["hidden_size"]
        self.eps = config["norm_eps"]
        self.modulation = nn.Linear(size, 6 * size)
        self.attn, self.ffn = Attention(config), FeedForward(config)

    def forward(self, x: Tensor, time: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(time).chunk(6, dim=-1)
        x = x + gate * self.attn(modulated(x, shift, scale, self.eps), cos, sin)
        return x + gate2 * self.ffn(modulated(x, shift2, scale2, self.eps))


class VideoDiT(nn.Module):
    """Velocity of noisy tokens (batch, 512, 12) at times (batch,) with words (batch, 4)."""

    def __init__(self, config: dict):
        super().__init__()
        size = config["hidden_size"]
        self.config = config
        self.patch = nn.Linear(config["patch_values"], size)
        self.words = nn.Embedding(config["vocabulary"], size)
        self.places = nn.Embedding(config["text_tokens"], size)
        self.time_in = nn.Linear(config["frequency_size"], size)
        self.time_out = nn.Linear(size, size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config["num_layers"]))
        self.modulation = nn.Linear(size, 2 * size)
        self.head = nn.Linear(size, config["patch_values"])
        angles = torch.from_numpy(rotary_angles(config)).float()
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for linear in (*(b.modulation for b in self.blocks), self.modulation, self.head):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.5)

    def forward(self, x: Tensor, time: Tensor, words: Tensor) -> Tensor:
        half = self.config["frequency_size"] // 2
        speed = torch.exp(-math.log(10000) * torch.arange(half) / half)
        angle = 1000 * time[:, None] * speed
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
        state = F.silu(self.time_out(F.silu(self.time_in(waves))))[:, None]
        hidden = torch.cat([self.words(words) + self.places.weight, self.patch(x)], dim=1)
        for block in self.blocks:
            hidden = block(hidden, state, self.cos, self.sin)
        shift, scale = self.modulation(state).chunk(2, dim=-1)
        video = hidden[:, self.config["text_tokens"] :]
        return self.head(modulated(video, shift, scale, self.config["norm_eps"]))
