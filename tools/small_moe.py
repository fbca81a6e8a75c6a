"""Qwen3-MoE and DeepSeek-V3 in PyTorch, small enough to read and to train on a CPU.

Modules are called as published checkpoints call their tensors; only the experts of a layer are
held in one tensor of each kind (``gate_up_proj``, ``down_proj``), which is how they train fast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Config = dict[str, Any]
SMALL = "embed_tokens", "lm_head", "mlp.gate.weight"
"""Tables and routers: they begin with small numbers, and are trained another way than the rest."""


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def rope_frequencies(config: Config, size: int) -> tuple[Tensor, float]:
    """Angle per position of each pair, and what cosines and sines are multiplied by."""
    theta, yarn = config["rope_theta"], config["rope_scaling"]
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    if yarn is None:
        return frequency, 1.0
    factor = yarn["factor"]

    def pair_of(rotations: float) -> float:
        length = yarn["original_max_position_embeddings"]
        return size * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_of(yarn["beta_slow"])), size - 1)
    ramp = (torch.arange(size // 2) - low) / ((high - low) or 0.001)
    ramp = ramp.clamp(0, 1)
    scale = yarn_mscale(factor, yarn["mscale"]) / yarn_mscale(factor, yarn["mscale_all_dim"])
    return frequency / factor * ramp + frequency * (1 - ramp), scale


def rope_tables(config: Config, size: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    frequency, scale = rope_frequencies(config, size)
    angle = torch.outer(torch.arange(first, first + count).double(), frequency)
    angle = torch.cat([angle, angle], -1)
    return (angle.cos() * scale).float(), (angle.sin() * scale).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class GroupedQueryAttention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        hidden, self.size = config["hidden_size"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = linear(hidden, heads * self.size)
        self.k_proj = linear(hidden, kv_heads * self.size)
        self.v_proj = linear(hidden, kv_heads * self.size)
        self.o_proj = linear(heads * self.size, hidden)
        self.q_norm = RMSNorm(self.size, config["rms_norm_eps"])
        self.k_norm = RMSNorm(self.size, config["rms_norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.size)).transpose(1, 2)

        q = rotate(self.q_norm(heads(self.q_proj(x))), cos, sin)
        k = rotate(self.k_norm(heads(self.k_proj(x))), cos, sin)
        v = heads(self.v_proj(x))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class LatentAttention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        hidden, self.heads = config["hidden_size"], config["num_attention_heads"]
        q_rank, self.rank = config["q_lora_rank"], config["kv_lora_rank"]
        self.plain, self.roped = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        self.value = config["v_head_dim"]
        head = self.plain + self.roped
        self.q_a_proj = linear(hidden, q_rank)
        self.q_a_layernorm = RMSNorm(q_rank)
        self.q_b_proj = linear(q_rank, self.heads * head)
        self.kv_a_proj_with_mqa = linear(hidden, self.rank + self.roped)
        self.kv_a_layernorm = RMSNorm(self.rank)
        self.kv_b_proj = linear(self.rank, self.heads * (self.plain + self.value))
        self.o_proj = linear(self.heads * self.value, hidden)
        yarn = config["rope_scaling"]
        mscale = yarn_mscale(yarn["factor"], yarn["mscale_all_dim"]) if yarn else 1.0
        self.scale = head**-0.5 * mscale**2

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Pairs stand side by side in the weights: first elements first, then the second ones."""
        return rotate(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), cos, sin)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q = heads(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))))
        latent, k_roped = self.kv_a_proj_with_mqa(x).split([self.rank, self.roped], -1)
        kv = heads(self.kv_b_proj(self.kv_a_layernorm(latent)))
        k_plain, v = kv.split([self.plain, self.value], -1)
        q_roped = self.rotated(q[..., self.plain :], cos, sin)
        k_roped = self.rotated(k_roped[:, None], cos, sin).expand(-1, self.heads, -1, -1)
        q = torch.cat([q[..., : self.plain], q_roped], -1)
        k = torch.cat([k_plain, k_roped], -1)
        padded = F.pad(v, (0, q.shape[-1] - self.value))  # equal sizes take the fast kernel
        mixed = F.scaled_dot_product_attention(q, k, padded, is_causal=True, scale=self.scale)
        return self.o_proj(mixed[..., : self.value].transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = linear(hidden, intermediate)
        self.up_proj = linear(hidden, intermediate)
        self.down_proj = linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SoftmaxRouter(nn.Module):
    """Qwen3-MoE's; balanced by a loss: experts * sum(share of the tokens * mean probability)."""

    def __init__(self, config: Config):
        super().__init__()
        self.k = config["num_experts_per_tok"]
        self.weight = nn.Parameter(torch.empty(config["num_experts"], config["hidden_size"]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = F.linear(x, self.weight).softmax(-1)
        weights, chosen = p.topk(self.k, -1)
        self.counts = chosen.flatten().bincount(minlength=len(self.weight))
        self.balance = len(self.weight) * (self.counts / len(x) * p.mean(0)).sum()
        return chosen, weights / weights.sum(-1, keepdim=True)


class SigmoidRouter(nn.Module):
    """DeepSeek-V3's; balanced by a bias that moves against each expert's load, without a loss."""

    def __init__(self, config: Config):
        super().__init__()
        self.k, self.groups = config["num_experts_per_tok"], config["n_group"]
        self.kept_groups, self.factor = config["topk_group"], config["routed_scaling_factor"]
        experts = config["n_routed_experts"]
        self.weight = nn.Parameter(torch.empty(experts, config["hidden_size"]))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = F.linear(x, self.weight).sigmoid()
        chosen = self.choose(s.detach() + self.e_score_correction_bias)
        self.counts = chosen.flatten().bincount(minlength=len(self.weight))
        weights = s.gather(-1, chosen)
        return chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.factor

    def choose(self, c: Tensor) -> Tensor:
        grouped = c.unflatten(-1, (self.groups, -1))
        best = grouped.topk(2, -1).values.sum(-1).topk(self.kept_groups, -1).indices
        dropped = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
        return grouped.masked_fill(dropped[..., None], -math.inf).flatten(1).topk(self.k, -1)[1]

    def move_bias(self, counts: Tensor, speed: float) -> None:
        """One step against the load of a batch.

        The least bias is kept at zero. That changes no choice, and scores stay above zero, where
        runtimes agree that fill those of dropped groups with 0 and those that take -inf.
        """
        bias = self.e_score_correction_bias
        bias += speed * torch.sign(counts.float().mean() - counts)
        bias -= bias.min().item()


class Experts(nn.Module):
    def __init__(self, count: int, hidden: int, intermediate: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, intermediate))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        token = order // chosen.shape[1]
        rows = x.index_select(0, token).split(counts.tolist())
        parts = []
        for row, gate_up, down in zip(
            rows, self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True
        ):
            gate, up = F.linear(row, gate_up).chunk(2, -1)
            parts.append(F.linear(F.silu(gate) * up, down))
        made = torch.cat(parts) * weights.flatten().index_select(0, order)[:, None]
        return torch.zeros_like(x).index_add(0, token, made)


class MoE(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        hidden, width = config["hidden_size"], config["moe_intermediate_size"]
        deepseek = config["model_type"] == "deepseek_v3"
        self.gate = (SigmoidRouter if deepseek else SoftmaxRouter)(config)
        self.experts = Experts(len(self.gate.weight), hidden, width)
        if deepseek:
            self.shared_experts = MLP(hidden, width * config["n_shared_experts"])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen, weights = self.gate(flat)
        made = self.experts(flat, chosen, weights, self.gate.counts).view_as(x)
        return made + self.shared_experts(x) if hasattr(self, "shared_experts") else made


class Block(nn.Module):
    def __init__(self, config: Config, index: int):
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        latent = "kv_lora_rank" in config
        self.self_attn = (LatentAttention if latent else GroupedQueryAttention)(config)
        dense = index < config.get("first_k_dense_replace", 0)
        self.mlp = MLP(hidden, config["intermediate_size"]) if dense else MoE(config)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class NextTokenBlock(Block):
    """The MTP layer: from the state after the final norm and the next token, the one after it."""

    def __init__(self, config: Config, index: int):
        super().__init__(config, index)
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.enorm, self.hnorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.eh_proj = linear(2 * hidden, hidden)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(hidden, eps)})

    def draft(self, embedded: Tensor, state: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        z = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(state)], -1))
        return self.shared_head["norm"](self(z, cos, sin))


class CausalLM(nn.Module):
    """Either model; its MTP layer shares the embedding and the head of the main model."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        layers, eps = config["num_hidden_layers"], config["rms_norm_eps"]
        vocabulary, hidden = config["vocab_size"], config["hidden_size"]
        blocks = [Block(config, i) for i in range(layers)]
        self.drafts = config.get("num_nextn_predict_layers", 0)
        blocks += [NextTokenBlock(config, layers + i) for i in range(self.drafts)]
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(vocabulary, hidden),
                "layers": nn.ModuleList(blocks),
                "norm": RMSNorm(hidden, eps),
            }
        )
        self.lm_head = linear(hidden, vocabulary)
        self.rope_size = config["qk_rope_head_dim" if self.drafts else "head_dim"]

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the next token, and the state after the final norm."""
        cos, sin = rope_tables(self.config, self.rope_size, 0, ids.shape[1])
        x = self.model["embed_tokens"](ids)
        for block in self.model["layers"][: self.config["num_hidden_layers"]]:
            x = block(x, cos, sin)
        state = self.model["norm"](x)
        return self.lm_head(state), state

    def draft(self, state: Tensor, following: Tensor) -> Tensor:
        """Logits of the token after ``following``, the next token of each state, from MTP."""
        cos, sin = rope_tables(self.config, self.rope_size, 1, state.shape[1])
        embedded = self.model["embed_tokens"](following)
        return self.lm_head(self.model["layers"][-1].draft(embedded, state, cos, sin))

    def routers(self) -> dict[int, nn.Module]:
        """The router of each MoE layer."""
        return {
            i: block.mlp.gate
            for i, block in enumerate(self.model["layers"])
            if isinstance(block.mlp, MoE)
        }


def initialise(model: CausalLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    depth = model.config["num_hidden_layers"]
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        small = any(word in name for word in SMALL)
        std = 0.02 if small else parameter.shape[-1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            std /= math.sqrt(2 * depth)
        nn.init.normal_(parameter, 0, std, generator)
