"""A DeepSeek-V3 with its layer for further tokens, in float64, one token and head after the other.

Written from the equations alone; rotary pairs are complex numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Weights = Mapping[str, np.ndarray]


def rms(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return gain * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def mlp(w: Weights, path: str, x: np.ndarray) -> np.ndarray:
    gate, up, down = (w[f"{path}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    g = x @ gate.T
    return (g * sigmoid(g) * (x @ up.T)) @ down.T


def experts(w: Weights, raw: Mapping[str, Any], path: str, x: np.ndarray) -> np.ndarray:
    each = raw["n_routed_experts"] // raw["n_group"]
    scores = sigmoid(x @ w[f"{path}.gate.weight"].T)
    wanted = scores + w[f"{path}.gate.e_score_correction_bias"]
    y = mlp(w, f"{path}.shared_experts", x)
    for t in range(len(x)):
        groups = wanted[t].reshape(raw["n_group"], each)
        worth = [np.sort(group)[-2:].sum() for group in groups]
        kept = np.argsort(worth)[::-1][: raw["topk_group"]]
        able = [e for e in range(raw["n_routed_experts"]) if e // each in kept]
        chosen = sorted(able, key=lambda e: wanted[t, e])[::-1][: raw["num_experts_per_tok"]]
        total = sum(scores[t, e] for e in chosen)
        for e in chosen:
            share = scores[t, e] / total * raw["routed_scaling_factor"]
            y[t] += share * mlp(w, f"{path}.experts.{e}", x[t])
    return y


def turned(x: np.ndarray, theta: float) -> np.ndarray:
    """Neighbouring channels of (tokens, D) are real and imaginary part."""
    tokens, size = x.shape
    turns = theta ** (-np.arange(0, size, 2) / size)
    pairs = x[:, 0::2] + 1j * x[:, 1::2]
    return pairs * np.exp(1j * np.arange(tokens)[:, None] * turns)


def attention(w: Weights, raw: Mapping[str, Any], path: str, x: np.ndarray) -> np.ndarray:
    n, r, v = raw["qk_nope_head_dim"], raw["qk_rope_head_dim"], raw["v_head_dim"]
    rank, heads, count = raw["kv_lora_rank"], raw["num_attention_heads"], len(x)
    low = rms(x @ w[f"{path}.q_a_proj.weight"].T, w[f"{path}.q_a_layernorm.weight"], 1e-6)
    q = (low @ w[f"{path}.q_b_proj.weight"].T).reshape(count, heads, n + r)
    a = x @ w[f"{path}.kv_a_proj_with_mqa.weight"].T
    latent = rms(a[:, :rank], w[f"{path}.kv_a_layernorm.weight"], 1e-6)
    made = (latent @ w[f"{path}.kv_b_proj.weight"].T).reshape(count, heads, n + v)
    key = turned(a[:, rank:], raw["rope_theta"])
    outputs = []
    for h in range(heads):
        query = turned(q[:, h, n:], raw["rope_theta"])
        scores = q[:, h, :n] @ made[:, h, :n].T + (query @ key.conj().T).real
        scores = np.where(np.tri(count, dtype=bool), scores / np.sqrt(n + r), -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        outputs.append(weights / weights.sum(axis=1, keepdims=True) @ made[:, h, n:])
    return np.concatenate(outputs, axis=1) @ w[f"{path}.o_proj.weight"].T


def block(w: Weights, raw: Mapping[str, Any], index: int, x: np.ndarray) -> np.ndarray:
    path, eps = f"model.layers.{index}", raw["rms_norm_eps"]
    x = x + attention(w, raw, f"{path}.self_attn", rms(x, w[f"{path}.input_layernorm.weight"], eps))
    rows = rms(x, w[f"{path}.post_attention_layernorm.weight"], eps)
    dense = index < raw["first_k_dense_replace"]
    return x + (mlp(w, f"{path}.mlp", rows) if dense else experts(w, raw, f"{path}.mlp", rows))


def logits(w: Weights, raw: Mapping[str, Any], ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the next token after each of (tokens,) ids, and of the next but one, drafted with the
    next one known: one row less."""
    w = {name: tensor.astype(np.float64) for name, tensor in w.items()}
    eps, last = raw["rms_norm_eps"], raw["num_hidden_layers"]
    x = w["model.embed_tokens.weight"][ids]
    for index in range(last):
        x = block(w, raw, index, x)
    hidden = rms(x, w["model.norm.weight"], eps)
    path = f"model.layers.{last}"
    embedded = w[f"{path}.embed_tokens.weight"][ids[1:]]
    both = [
        rms(embedded, w[f"{path}.enorm.weight"], eps),
        rms(hidden[:-1], w[f"{path}.hnorm.weight"], eps),
    ]
    z = block(w, raw, last, np.concatenate(both, axis=1) @ w[f"{path}.eh_proj.weight"].T)
    drafted = rms(z, w[f"{path}.shared_head.norm.weight"], eps)
    return hidden @ w["lm_head.weight"].T, drafted @ w[f"{path}.shared_head.head.weight"].T
