"""A small video diffusion transformer as MindSpore Cells, and its sampling loop.

As in CogVideoX, words and video are one sequence, words first; rotary positions reach the video
alone. Its weights are in models/moving-shapes-dit; examples/diffusion.py quantizes it.

Each attention calls its attribute ``fa_quant(q, k, v, layout="BNSD")`` where something has attached
one, as MindIE-SD's models do, and computes softmax attention itself where nothing has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ms_quant import TimestepManager

MODEL = Path(__file__).resolve().parents[1] / "models" / "moving-shapes-dit"
STEPS = 20


class RMSNorm(nn.Cell):
    """Over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = Parameter(np.ones(size, np.float32)), eps

    def construct(self, x: Tensor) -> Tensor:
        return x * ops.rsqrt((x * x).mean(-1, keep_dims=True) + self.eps) * self.weight


class Table(nn.Cell):
    """A vector for each word, under PyTorch's name of an embedding's weight."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.weight = Parameter(np.zeros((count, size), np.float32))

    def construct(self, ids: Tensor) -> Tensor:
        return ops.gather(self.weight, ids, 0)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm, then what the time makes of it."""
    x = x - x.mean(-1, keep_dims=True)
    return x * ops.rsqrt((x * x).mean(-1, keep_dims=True) + eps) * (1 + scale) + shift


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; a pair is a channel of the first half and one of the second."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return ops.cat((first * cos - second * sin, second * cos + first * sin), -1)


def rotary_angles(config: dict[str, Any]) -> np.ndarray:
    """Angle of each pair of channels of each token, float32 (tokens, head size / 2)."""
    parts, places = [], np.indices(config["latent_shape"]).reshape(3, -1)
    for size, at in zip(config["rope_axes"], places, strict=True):
        pairs = size // 2
        speed = config["rope_top"] * config["rope_theta"] ** (-np.arange(pairs) / pairs)
        parts.append(at[:, None] * speed)
    video = np.concatenate(parts, axis=1)
    return np.pad(video, ((config["text_tokens"], 0), (0, 0))).astype(np.float32)


class SelfAttention(nn.Cell):
    """Attention over words and video."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        size = config["hidden_size"]
        self.heads, self.head_dim = config["num_heads"], size // config["num_heads"]
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Dense(size, size) for _ in range(4))
        self.norm_q = RMSNorm(self.head_dim, config["norm_eps"])
        self.norm_k = RMSNorm(self.head_dim, config["norm_eps"])

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (self.split(linear(x)) for linear in (self.to_q, self.to_k, self.to_v))
        q, k = rotated(self.norm_q(q), cos, sin), rotated(self.norm_k(k), cos, sin)
        fa_quant = getattr(self, "fa_quant", None)
        out = self.attention(q, k, v) if fa_quant is None else fa_quant(q, k, v, layout="BNSD")
        return self.to_out(out.swapaxes(1, 2).reshape(x.shape))

    def split(self, x: Tensor) -> Tensor:
        """(batch, tokens, size) to (batch, heads, tokens, head size)."""
        return x.reshape((x.shape[0], x.shape[1], self.heads, -1)).swapaxes(1, 2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What an attached attention stands in the place of."""
        scores = ops.matmul(q, k.swapaxes(-1, -2)) / math.sqrt(q.shape[-1])
        return ops.matmul(ops.softmax(scores, -1), v)


class FeedForward(nn.Cell):
    """Two linears with a GELU between."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.up = nn.Dense(config["hidden_size"], config["ffn_size"])
        self.down = nn.Dense(config["ffn_size"], config["hidden_size"])

    def construct(self, x: Tensor) -> Tensor:
        return self.down(ops.gelu(self.up(x), approximate="tanh"))


class Block(nn.Cell):
    """Attention and feed-forward, both modulated by the time (adaLN-zero)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.eps = config["norm_eps"]
        self.modulation = nn.Dense(config["hidden_size"], 6 * config["hidden_size"])
        self.attn, self.ffn = SelfAttention(config), FeedForward(config)

    def construct(self, x: Tensor, time: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = ops.chunk(self.modulation(time), 6, -1)
        x = x + gate * self.attn(modulated(x, shift, scale, self.eps), cos, sin)
        return x + gate2 * self.ffn(modulated(x, shift2, scale2, self.eps))


class VideoDiT(nn.Cell):
    """Velocity of a noisy video.

    Args:
        config: the content of the model's config.json.

    Inputs:
        - **x** float32 (batch, video tokens, values of a patch).
        - **time** float32 (batch,), 0 for a clip and 1 for noise.
        - **words** int32 (batch, text tokens).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        size, half = config["hidden_size"], config["frequency_size"] // 2
        self.config = config
        self.patch = nn.Dense(config["patch_values"], size)
        self.words = Table(config["vocabulary"], size)
        self.places = Table(config["text_tokens"], size)
        self.time_in = nn.Dense(config["frequency_size"], size)
        self.time_out = nn.Dense(size, size)
        self.blocks = nn.CellList([Block(config) for _ in range(config["num_layers"])])
        self.modulation = nn.Dense(size, 2 * size)
        self.head = nn.Dense(size, config["patch_values"])
        angles = rotary_angles(config)
        self.cos, self.sin = Tensor(np.cos(angles)), Tensor(np.sin(angles))
        self.speeds = Tensor((1000 * 10000.0 ** (-np.arange(half) / half)).astype(np.float32))

    def construct(self, x: Tensor, time: Tensor, words: Tensor) -> Tensor:
        angle = time.reshape((-1, 1)) * self.speeds
        state = self.time_in(ops.cat((ops.cos(angle), ops.sin(angle)), -1))
        state = ops.silu(self.time_out(ops.silu(state))).expand_dims(1)
        text = self.words(words) + self.places.weight
        hidden = ops.cat((text, self.patch(x)), 1)
        for block in self.blocks:
            hidden = block(hidden, state, self.cos, self.sin)
        shift, scale = ops.chunk(self.modulation(state), 2, -1)
        video = hidden[:, self.config["text_tokens"] :]
        return self.head(modulated(video, shift, scale, self.config["norm_eps"]))


def load(directory: Path = MODEL) -> VideoDiT:
    """The network of a directory with config.json and model.safetensors."""
    network = VideoDiT(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    stored = ms.load_checkpoint(str(directory / "model.safetensors"), format="safetensors")
    missing, unknown = ms.load_param_into_net(network, stored, strict_load=True)
    if missing or unknown:
        raise ValueError(f"{directory}: missing {missing}, unknown {unknown}")
    return network.set_train(False)


def attach(network: VideoDiT, attention: Callable[..., np.ndarray]) -> None:
    """Has every block call ``attention(q, k, v, layer, step)`` in the place of its own.

    Arrays are float32 (batch, heads, tokens, head size), after norms and rotary positions.
    """
    for layer, block in enumerate(network.blocks):
        block.attn.fa_quant = partial(_in_numpy, attention, layer)


def _in_numpy(
    attention: Callable[..., np.ndarray], layer: int, q: Tensor, k: Tensor, v: Tensor, layout: str
) -> Tensor:
    arrays = (np.ascontiguousarray(x.asnumpy()) for x in (q, k, v))
    return Tensor(attention(*arrays, layer, TimestepManager.get_timestep_idx()))


def trajectory(
    network: nn.Cell, noise: np.ndarray, words: np.ndarray, steps: int = STEPS
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Euler's method from noise to clips: what each step calls the network with, before it does.

    The step's index is set meanwhile. One more item comes last: the clips, at time 0.
    """
    x, prompts = Tensor(noise), Tensor(words)
    for step in range(steps):
        TimestepManager.set_timestep_idx(step)
        time = Tensor(np.full(len(noise), 1 - step / steps, np.float32))
        yield x, time, prompts
        x = x - network(x, time, prompts) / steps
    TimestepManager.set_timestep_idx(None)
    yield x, Tensor(np.zeros(len(noise), np.float32)), prompts


def sample(
    network: nn.Cell, noise: np.ndarray, words: np.ndarray, steps: int = STEPS
) -> np.ndarray:
    """Clips that a network makes of noise, as tokens, float32 (count, 512, 12)."""
    *_, (clips, _, _) = trajectory(network, noise, words, steps)
    return clips.asnumpy()
