"""The blocks of GLM-4: a norm before and after each branch, and an MLP whose gate is one linear
with what it gates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ms_quant import kernels
from ms_quant.models.block_spec import (
    BlockSpec,
    Division,
    LinearGroup,
    LinearSpec,
    NormSpec,
    Operators,
)
from ms_quant.models.edge import Edge
from ms_quant.models.gated_block import Attention, GatedMlp

if TYPE_CHECKING:
    from ms_quant.models.config import ModelConfig

AFTER_ATTENTION, AFTER_MLP = "post_self_attn_layernorm", "post_mlp_layernorm"


class FusedMlp(GatedMlp):
    """norm(down(silu(gate) * up)), where gate and up are halves of what one linear makes.

    Checkpoints and runtimes have that linear, ``gate_up_proj``, under its own name.

    Args:
        config: the model's shape.
    """

    def __init__(self, config: ModelConfig):
        hidden, size = config.hidden_size, config.intermediate_size
        super().__init__(hidden, size)
        both, down = f"{self.path}.gate_up_proj", self.last[0]
        halves = Division("column", "intermediate_size", size, parts=2)
        made = LinearSpec(2 * size, hidden, division=halves, reads_stream=True)
        self.modules = {
            self.norm: self.modules[self.norm],
            both: made,
            down: LinearSpec(hidden, size, division=Division("row", "intermediate_size", size)),
            AFTER_MLP: NormSpec(hidden, reads_stream=False, writes_stream=True),
        }
        _, last = self.groups
        self.groups = (LinearGroup("gate_up", "gate_up", {both: made}, both), last)
        up = Edge(both, ("down",), size=size, skipped=size)
        self.edges = Edge(self.norm, ("gate_up",), norm=True), up

    def gated(self, ops: Operators, rows: np.ndarray) -> np.ndarray:
        """The input of down_proj, of what the norm gives."""
        gate, up = np.split(ops.linear(f"{self.path}.gate_up_proj", rows), 2, axis=-1)
        return ops.between(f"{self.path}.down_proj input", kernels.swiglu(gate, up))

    def outer(self, ops: Operators, inner: np.ndarray) -> np.ndarray:
        """The norm of down_proj of it."""
        return ops.norm(AFTER_MLP, super().outer(ops, inner))


def glm_block(config: ModelConfig, index: int) -> BlockSpec:
    """A block of GLM-4."""
    return BlockSpec.of(index, (Attention(config, after=AFTER_ATTENTION), FusedMlp(config)))
