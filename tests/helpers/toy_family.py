"""A family whose blocks differ: the first is dense, the others have routed experts.

One norm is read by a float router, by every expert and by an MLP that all tokens pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ms_quant.models.block_forward import Positions
from ms_quant.models.block_spec import BlockSpec, Branch, LinearSpec, Operators
from ms_quant.models.cache import KeyValueCache
from ms_quant.models.config import ModelConfig
from ms_quant.models.edge import Edge
from ms_quant.models.families import Family
from ms_quant.models.gated_block import Attention, GatedMlp, gated_block

NORM, ROUTER = "post_attention_layernorm", "mlp.gate"


class Experts(Branch):
    """A shared MLP, and to each token the expert that its router gives the largest score."""

    title = "experts"
    taps = ("router scores",)

    def __init__(self, config: ModelConfig):
        count, size = config.raw["n_routed_experts"], config.raw["moe_intermediate_size"]
        hidden, unit = config.hidden_size, "moe_intermediate_size"
        self.experts = [
            GatedMlp(
                hidden, size, False, f"mlp.experts.{i}", f"experts.{i}.", unit, NORM, "experts"
            )
            for i in range(count)
        ]
        self.shared = GatedMlp(
            hidden, size, False, "mlp.shared_experts", "shared.", unit, part="shared"
        )
        parts = [*self.experts, self.shared]
        router = {ROUTER: LinearSpec(count, hidden, reads_stream=True)}
        self.modules = {path: spec for part in parts for path, spec in part.modules.items()}
        self.modules = {NORM: self.modules[NORM], **router, **self.modules}
        self.groups = tuple(group for part in parts for group in part.groups)
        readers = tuple(name for part in parts for name in part.edges[0].consumers)
        self.edges = (
            Edge(NORM, readers, norm=True, floats=(ROUTER,)),
            *(part.edges[1] for part in parts),
        )
        self.last = tuple(path for part in parts for path in part.last)

    def inner(
        self, ops: Operators, x: np.ndarray, at: Positions, cache: KeyValueCache | None
    ) -> Any:
        rows = ops.norm(NORM, x).reshape(-1, x.shape[-1])
        scores = 1 / (1 + np.exp(-ops.linear(ROUTER, rows)))
        ops.show(self.taps[0], scores)
        chosen = scores.argmax(axis=1)
        parts = []
        for i, expert in enumerate(self.experts):
            tokens = np.flatnonzero(chosen == i)
            parts.append((tokens, scores[tokens, i, None], expert.gated(ops, rows[tokens])))
        return parts, self.shared.gated(ops, rows)

    def outer(self, ops: Operators, inner: Any) -> np.ndarray:
        parts, shared = inner
        y = self.shared.outer(ops, shared).copy()
        for expert, (tokens, scores, gated) in zip(self.experts, parts, strict=True):
            if len(tokens):
                y[tokens] += scores * expert.outer(ops, gated)
        return y


def toy_block(config: ModelConfig, index: int) -> BlockSpec:
    if index < config.raw["first_k_dense_replace"]:
        return gated_block(config, index)
    return BlockSpec.of(index, (Attention(config), Experts(config)))


FAMILY = Family(
    "Toy",
    defaults={"n_routed_experts": 1, "moe_intermediate_size": 1, "first_k_dense_replace": 0},
    block=toy_block,
)
CONFIG = {
    "model_type": "toy",
    "architectures": ["ToyForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "n_routed_experts": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def tensors_of(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights, float32; some channels of norms are large."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in config.parameter_shapes().items():
        if len(shape) == 1:
            tensors[name] = np.exp(rng.normal(0, 1, shape)).astype(np.float32)
        else:
            tensors[name] = (rng.normal(size=shape) / np.sqrt(shape[1])).astype(np.float32)
    return tensors
