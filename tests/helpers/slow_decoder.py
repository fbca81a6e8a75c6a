"""A decoder written once more, slowly and in float64: the oracle of every test of a forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray


class SlowDecoder:
    """A decoder with gated blocks, plain rotary positions and one window of tokens.

    Args:
        config: the model's shape.
        tensors: its parameters by their Hugging Face names.
        linears: functions of float32 (tokens, in) in place of the linears at some paths.
        rounded: what every tensor between two operators is rounded by.
    """

    def __init__(
        self,
        config: Any,
        tensors: Mapping[str, Array],
        linears: Mapping[str, Callable[[Array], Array]] | None = None,
        rounded: Callable[[Array], Array] = lambda x: x,
    ):
        assert config.rope["rope_type"] == "default"
        self.config, self.linears, self.rounded = config, linears or {}, rounded
        self.tensors = {name: np.asarray(array, np.float64) for name, array in tensors.items()}

    def norm(self, path: str, x: Array) -> Array:
        power = np.mean(x * x, axis=-1, keepdims=True) + self.config.rms_norm_eps
        return self.rounded(x / np.sqrt(power) * self.tensors[f"{path}.weight"])

    def linear(self, path: str, x: Array) -> Array:
        if path in self.linears:
            return self.rounded(self.linears[path](x.astype(np.float32)).astype(np.float64))
        y = x @ self.tensors[f"{path}.weight"].T + self.tensors.get(f"{path}.bias", 0.0)
        return self.rounded(y)

    def rope(self, x: Array, index: int) -> Array:
        """(heads, tokens, D), each pair (i, i + D / 2) turned by its angle."""
        if index in self.config.unrotated:
            return x
        half, theta = x.shape[-1] // 2, self.config.rope["rope_theta"]
        angles = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
        low, high, cos, sin = x[..., :half], x[..., half:], np.cos(angles), np.sin(angles)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    def queries_keys_values(self, index: int, x: Array) -> tuple[Array, Array, Array]:
        """(heads, tokens, D) each, as attention reads them and a cache holds them."""
        path = f"model.layers.{index}.self_attn"
        x = self.norm(f"model.layers.{index}.input_layernorm", x)
        q, k, v = (
            self.linear(f"{path}.{part}_proj", x).reshape(len(x), -1, self.config.head_dim)
            for part in "qkv"
        )
        if self.config.qk_norm:
            q, k = self.norm(f"{path}.q_norm", q), self.norm(f"{path}.k_norm", k)
        q, k, v = (part.transpose(1, 0, 2) for part in (q, k, v))
        return self.rope(q, index), self.rope(k, index), v

    def attention(self, index: int, x: Array) -> Array:
        q, k, v = self.queries_keys_values(index, x)
        share = self.config.num_heads // self.config.num_kv_heads
        k, v = np.repeat(k, share, axis=0), np.repeat(v, share, axis=0)
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(self.config.head_dim)
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = weights / weights.sum(-1, keepdims=True) @ v
        y = self.rounded(y.transpose(1, 0, 2).reshape(len(x), -1))
        return self.linear(f"model.layers.{index}.self_attn.o_proj", y)

    def mlp(self, index: int, x: Array) -> Array:
        path = f"model.layers.{index}.mlp"
        x = self.norm(f"model.layers.{index}.post_attention_layernorm", x)
        gate, up = self.linear(f"{path}.gate_proj", x), self.linear(f"{path}.up_proj", x)
        return self.linear(f"{path}.down_proj", self.rounded(gate / (1 + np.exp(-gate)) * up))

    def block(self, index: int, x: Array) -> Array:
        """(tokens, hidden) of the same."""
        x = self.rounded(x + self.attention(index, x))
        return self.rounded(x + self.mlp(index, x))

    def embed(self, ids: Array) -> Array:
        return self.tensors["model.embed_tokens.weight"][ids]

    def logits(self, ids: Array) -> Array:
        """float64 (tokens, vocab)."""
        x = self.embed(ids)
        for index in range(self.config.num_layers):
            x = self.block(index, x)
        x = self.norm("model.norm", x)
        return self.linear("model.embed_tokens" if self.config.tied else "lm_head", x)

    def losses(self, windows: Array) -> Array:
        """Negative log likelihood of each token but the first, of (windows, tokens)."""
        return np.stack([self._losses(ids) for ids in windows])

    def _losses(self, ids: Array) -> Array:
        logits = self.logits(ids)[:-1]
        log_total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
        return log_total + logits.max(-1) - np.take_along_axis(logits, ids[1:, None], -1)[:, 0]
