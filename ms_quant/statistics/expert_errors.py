"""Errors of candidates where experts are: of a branch before them, or of one expert alone.

A block with experts is never run for a candidate. What attention makes is compared right after it,
and what an expert makes at its own output, over the tokens that the float router sends to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np

from ms_quant.budget import BUDGET, Budget
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.experts import Experts
from ms_quant.models.gated_block import GatedMlp
from ms_quant.models.linear_forward import Linear
from ms_quant.models.routing import sigmoid
from ms_quant.statistics.search_windows import (
    BlockErrors,
    BranchErrors,
    Candidate,
    CandidateErrors,
    RoutedTokens,
    SearchWindows,
    forwards,
)


class MlpErrors(CandidateErrors):
    """What candidates in place of a group's float linears change in the output of one MLP.

    Args:
        mlp: the MLP: an expert, or the one beside the experts.
        linears: what computes its float linears, by their paths in the block.
        group: the group.
        rows: float32 (tokens, hidden), what it reads.
        weights: float32 (tokens, 1), what its outputs are multiplied by; None is 1.
        budget: what bounds memory.
    """

    def __init__(
        self,
        mlp: GatedMlp,
        linears: Mapping[str, Linear],
        group: LinearGroup,
        rows: np.ndarray,
        weights: np.ndarray | None = None,
        budget: Budget = BUDGET,
    ):
        self.mlp, self.linears, self.group, self.budget = mlp, linears, group, budget
        self.rows, self.weights = rows, weights

    def pairs(
        self, candidate: Candidate, decode: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Error and float output, of some tokens at a time."""
        ops = _Alone({**self.linears, **forwards(candidate, decode)}, self.budget)
        for part, exact in self._exact:
            inner = self._inner[part] if self._is_last else self.mlp.gated(ops, self.rows[part])
            yield self._weighted(self.mlp.outer(ops, inner), part) - exact, exact

    @property
    def _is_last(self) -> bool:
        return set(self.group.members) <= set(self.mlp.last)

    @cached_property
    def _inner(self) -> np.ndarray:
        """What the last linears read, which no candidate for them changes."""
        return self.mlp.gated(_Alone(self.linears, self.budget), self.rows)

    @cached_property
    def _exact(self) -> list[tuple[slice, np.ndarray]]:
        """The float output of some tokens at a time."""
        ops, step = _Alone(self.linears, self.budget), self.budget.batch_tokens
        parts = [slice(start, start + step) for start in range(0, len(self.rows), step)]
        return [
            (part, self._weighted(self.mlp.outer(ops, self._inner[part]), part)) for part in parts
        ]

    def _weighted(self, output: np.ndarray, part: slice) -> np.ndarray:
        return output if self.weights is None else output * self.weights[part]


class _Alone:
    """The linears of an MLP and nothing else, as a branch computes with them."""

    def __init__(self, linears: Mapping[str, Linear], budget: Budget):
        self.linears, self.budget = linears, budget

    def norm(self, path: str, x: np.ndarray) -> np.ndarray:
        raise AssertionError(f"{path}: an MLP alone has no norm")

    def linear(self, path: str, x: np.ndarray) -> np.ndarray:
        return self.linears[path](x)

    def parameter(self, name: str) -> np.ndarray:
        raise AssertionError(f"{name}: an MLP alone has linears only")

    def between(self, place: str, x: np.ndarray) -> np.ndarray:
        return x

    def shows(self, tap: str) -> bool:
        return False

    def show(self, tap: str, x: np.ndarray) -> None:
        """Nobody looks on."""


def errors_of(
    block: BlockForward, at: Positions, group: LinearGroup, windows: SearchWindows
) -> CandidateErrors:
    """What candidates in place of a group's float linears change: in the block's output, unless it
    has experts.

    Args:
        block: the float block.
        at: the positions of a window's tokens.
        group: the group.
        windows: the activations that are looked at.
    """
    spec = block.spec
    which = spec.branch_of(group)
    branch = spec.branches[which]
    if isinstance(branch, Experts) and len(windows.chosen):  # else nobody searches
        return _of_experts(block, which, branch, group, windows)
    experts = any(isinstance(later, Experts) for later in spec.branches[which:])
    return (BranchErrors if experts else BlockErrors)(block, at, group, windows)


def _of_experts(
    block: BlockForward, which: int, branch: Experts, group: LinearGroup, windows: SearchWindows
) -> MlpErrors:
    if windows.routed is None:
        windows.routed = routed_tokens(block, which, branch, windows)
    tokens, linears = windows.routed, block.linears
    if not group.routed:
        assert branch.shared is not None
        opened = sigmoid(block.linear(branch.gate, tokens.rows)) if branch.gate else None
        return MlpErrors(branch.shared, linears, group, tokens.rows, opened, block.budget)
    first = group.members[0]
    index = next(i for i, expert in enumerate(branch.experts) if first in expert.modules)
    return MlpErrors(branch.experts[index], linears, group, *tokens.of(index), block.budget)


def routed_tokens(
    block: BlockForward, which: int, branch: Experts, windows: SearchWindows
) -> RoutedTokens:
    """The tokens that searches look at, as the experts of a branch read them; no expert is read."""
    parts = []
    for states in windows.batches(block.budget):
        rows = block.norm(branch.edges[0].producer, states[which]).reshape(-1, branch.hidden)
        parts.append((rows, *branch.route(block, rows)))
    return RoutedTokens(*(np.concatenate(part) for part in zip(*parts, strict=True)))
