"""The MLP of a mixture of experts: a router, the experts that it chooses, and one for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ms_quant.models.block_spec import Branch, LinearSpec, Operators
from ms_quant.models.edge import Edge
from ms_quant.models.gated_block import GatedMlp
from ms_quant.models.names import expert_path
from ms_quant.models.routing import Routing, sigmoid

if TYPE_CHECKING:
    from ms_quant.models.block_forward import Positions
    from ms_quant.models.cache import AnyCache

NORM, ROUTER, EXPERTS = "post_attention_layernorm", "mlp.gate", "mlp.experts"
CORRECTION = "e_score_correction_bias"
SCORES = "router scores"


@dataclass(frozen=True)
class RouterSpec(LinearSpec):
    """A router: a linear that is never quantized.

    Attributes:
        corrected: whether it has a bias for choosing, of float32.
    """

    corrected: bool = False

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Suffix to shape."""
        more: dict[str, tuple[int, ...]] = {CORRECTION: (self.out_features,)}
        return {**super().tensors, **(more if self.corrected else {})}


class Routed(NamedTuple):
    """Tokens that go to one expert.

    Attributes:
        tokens: which rows, ascending int64.
        weights: float32 (rows, 1), what the expert's outputs are multiplied by.
        gated: float32 (rows, size), what its down_proj reads.
    """

    tokens: np.ndarray
    weights: np.ndarray
    gated: np.ndarray


class Inner(NamedTuple):
    """What the last linears of :class:`Experts` read.

    Attributes:
        routed: of each expert.
        shared: of the MLP that all tokens pass, and what its outputs are multiplied by.
        rows: how many tokens there are.
    """

    routed: list[Routed]
    shared: tuple[np.ndarray, np.ndarray | None] | None
    rows: int


class Experts(Branch):
    """Routed experts, and beside them an MLP that all tokens pass.

    Args:
        hidden: channels of the residual stream.
        routing: how many experts there are, and how a token finds its own.
        shared: path in the block of the MLP for all tokens.

    Attributes:
        routing: as given.
        experts: the experts.
        shared: the MLP for all tokens, or None.
    """

    title = "experts"
    taps = (SCORES,)

    def __init__(self, hidden: int, routing: Routing, shared: str = "mlp.shared_experts"):
        self.hidden, self.routing, size, unit = hidden, routing, routing.size, routing.unit
        self.experts = [
            GatedMlp(
                *(hidden, size, False, expert_path(EXPERTS, i), f"experts.{i}.", unit, NORM),
                part="experts",
            )
            for i in range(routing.experts)
        ]
        self.shared = (
            GatedMlp(hidden, routing.shared, False, shared, "shared.", unit, NORM, "shared")
            if routing.shared
            else None
        )
        self.gate = f"{shared}_gate" if routing.shared_gate else ""
        floats = {
            ROUTER: RouterSpec(
                routing.experts, hidden, reads_stream=True, corrected=routing.scoring == "sigmoid"
            )
        }
        if self.gate:
            floats[self.gate] = RouterSpec(1, hidden, reads_stream=True)
        parts = [*self.experts, *([self.shared] if self.shared else [])]
        within = {path: spec for part in parts for path, spec in part.modules.items()}
        self.modules = {NORM: within[NORM], **floats, **within}
        self.groups = tuple(group for part in parts for group in part.groups)
        readers = tuple(name for part in parts for name in part.edges[0].consumers)
        self.edges = (
            Edge(NORM, readers, norm=True, floats=tuple(floats)),
            *(part.edges[1] for part in parts),
        )
        self.last = tuple(path for part in parts for path in part.last)

    def route(self, ops: Operators, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The experts of each token and their weights, see :meth:`Routing.route`; rows are float32
        (tokens, hidden) as the norm gives them."""
        products = ops.linear(ROUTER, rows)
        ops.show(SCORES, products)
        corrected = self.routing.scoring == "sigmoid"
        correction = ops.parameter(f"{ROUTER}.{CORRECTION}") if corrected else None
        return self.routing.route(products, correction)

    def inner(self, ops: Operators, x: np.ndarray, at: Positions, cache: AnyCache | None) -> Inner:
        """What the down_proj of each expert reads."""
        rows = ops.norm(NORM, x).reshape(-1, self.hidden)
        chosen, weights = self.route(ops, rows)
        routed = []
        for index, expert in enumerate(self.experts):
            tokens, at_token = np.nonzero(chosen == index)
            gated = expert.gated(ops, rows[tokens])
            routed.append(Routed(tokens, weights[tokens, at_token, None], gated))
        return Inner(routed, self.shared_inner(ops, rows), len(rows))

    def shared_inner(
        self, ops: Operators, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None] | None:
        """What the down_proj of the MLP for all tokens reads, and what it is multiplied by."""
        if self.shared is None:
            return None
        opened = sigmoid(ops.linear(self.gate, rows)) if self.gate else None
        return self.shared.gated(ops, rows), opened

    def shared_outer(
        self, ops: Operators, inner: tuple[np.ndarray, np.ndarray | None]
    ) -> np.ndarray:
        """What the MLP for all tokens gives."""
        assert self.shared is not None
        gated, opened = inner
        y = self.shared.outer(ops, gated)
        return y if opened is None else y * opened

    def outer(self, ops: Operators, inner: Inner) -> np.ndarray:
        """The sum of what the experts give, times their weights; the MLP for all comes last."""
        y = np.zeros((inner.rows, self.hidden), np.float32)
        for expert, routed in zip(self.experts, inner.routed, strict=True):
            if len(routed.tokens):
                y[routed.tokens] += routed.weights * expert.outer(ops, routed.gated)
        if inner.shared is not None:
            y += self.shared_outer(ops, inner.shared)
        return y
