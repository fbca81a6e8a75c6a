"""Latent attention and experts written once more, slowly and in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from slow_decoder import SlowDecoder

Array = np.ndarray


def rms(x: Array, gain: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


class SlowRouted(SlowDecoder):
    """A decoder with experts, of DeepSeek's or Qwen's kind, and one window of tokens.

    Attributes:
        routes: of each block with experts, the experts of each token, sorted (tokens, per token).
        state: float64 (tokens, hidden), what the last norm gave.
    """

    def __init__(
        self,
        config: Any,
        tensors: Mapping[str, Array],
        linears: Mapping[str, Callable[[Array], Array]] | None = None,
    ):
        super().__init__(config, tensors, linears)
        self.routes: dict[int, Array] = {}

    def attention(self, index: int, x: Array) -> Array:
        if self.config.latent is None:
            return super().attention(index, x)
        path, shape, heads = f"model.layers.{index}.self_attn", self.config.latent, None
        heads = self.config.num_heads
        x = self.norm(f"model.layers.{index}.input_layernorm", x)
        if shape.q_rank:
            low = self.linear(f"{path}.q_a_proj", x)
            low = rms(low, self.tensors[f"{path}.q_a_layernorm.weight"], 1e-6)
            q = self.linear(f"{path}.q_b_proj", low)
        else:
            q = self.linear(f"{path}.q_proj", x)
        q = q.reshape(len(x), heads, shape.query).transpose(1, 0, 2)
        both = self.linear(f"{path}.kv_a_proj_with_mqa", x)
        gain = self.tensors[f"{path}.kv_a_layernorm.weight"]
        latent = rms(both[:, : shape.kv_rank], gain, 1e-6)
        key = self.turned(both[None, :, shape.kv_rank :], index)
        made = self.linear(f"{path}.kv_b_proj", latent)
        made = made.reshape(len(x), heads, -1).transpose(1, 0, 2)
        k, v = made[..., : shape.nope], made[..., shape.nope :]
        turned = self.turned(q[..., shape.nope :], index)
        scores = q[..., : shape.nope] @ k.transpose(0, 2, 1) + turned @ key.transpose(0, 2, 1)
        scores = scores / np.sqrt(shape.query)
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(x), -1)
        return self.linear(f"{path}.o_proj", y)

    def turned(self, x: Array, index: int) -> Array:
        if self.config.latent.interleaved:
            x = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
        return self.rope(x, index)

    def expert(self, path: str, x: Array) -> Array:
        gated = silu(self.linear(f"{path}.gate_proj", x)) * self.linear(f"{path}.up_proj", x)
        return self.linear(f"{path}.down_proj", gated)

    def mlp(self, index: int, x: Array) -> Array:
        routing, path = self.config.routing, f"model.layers.{index}.mlp"
        if index not in routing.sparse:
            return super().mlp(index, x)
        x = self.norm(f"model.layers.{index}.post_attention_layernorm", x)
        products = x @ self.tensors[f"{path}.gate.weight"].T
        if routing.scoring == "sigmoid":
            scores = 1 / (1 + np.exp(-products))
            choice = scores + self.tensors[f"{path}.gate.e_score_correction_bias"]
            groups = choice.reshape(len(x), routing.groups, -1)
            if routing.groups > 1:
                best = np.sort(groups, axis=-1)[..., -2:].sum(-1)
                worst = np.argsort(best, axis=-1)[:, : routing.groups - routing.groups_per_token]
                for token, left_out in enumerate(worst):
                    groups[token, left_out] = -np.inf
            choice = groups.reshape(len(x), -1)
        else:
            scores = np.exp(products - products.max(-1, keepdims=True))
            choice = scores = scores / scores.sum(-1, keepdims=True)
        chosen = np.sort(np.argsort(-choice, axis=-1)[:, : routing.per_token], axis=-1)
        self.routes[index] = chosen
        weights = np.take_along_axis(scores, chosen, -1)
        if routing.normalized:
            weights = weights / weights.sum(-1, keepdims=True)
        y = np.zeros_like(x)
        for token, experts in enumerate(chosen):
            for weight, expert in zip(weights[token] * routing.scale, experts, strict=True):
                y[token] += (
                    weight * self.expert(f"{path}.experts.{expert}", x[token : token + 1])[0]
                )
        if routing.shared_gate:
            opened = 1 / (1 + np.exp(-(x @ self.tensors[f"{path}.shared_expert_gate.weight"].T)))
            return y + opened * self.expert(f"{path}.shared_expert", x)
        return y + self.expert(f"{path}.shared_experts", x) if routing.shared else y

    def logits(self, ids: Array) -> Array:
        x = self.embed(ids)
        for index in range(self.config.num_layers):
            x = self.block(index, x)
        self.state = self.norm("model.norm", x)
        return self.linear("model.embed_tokens" if self.config.tied else "lm_head", self.state)

    def further(self, ids: Array) -> Array:
        """Logits of the tokens after the next ones, by the first block behind the last; positions
        begin at 0, which attention does not notice."""
        path = f"model.layers.{self.config.num_layers}"
        self.logits(ids)
        embedded = self.norm(f"{path}.enorm", self.tensors[f"{path}.embed_tokens.weight"][ids[1:]])
        states = self.norm(f"{path}.hnorm", self.state[:-1])
        x = self.linear(f"{path}.eh_proj", np.concatenate([embedded, states], axis=-1))
        x = self.norm(f"{path}.shared_head.norm", self.block(self.config.num_layers, x))
        return self.linear(f"{path}.shared_head.head", x)
