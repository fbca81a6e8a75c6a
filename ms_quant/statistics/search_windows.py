"""What searches look at: some windows of tokens, and what candidates change in a block's output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from ms_quant.budget import Budget
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.linear_forward import Linear, QuantizedForward
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.statistics.errors import token_error, token_shares
from ms_quant.statistics.kept import spread


@dataclass(frozen=True)
class RoutedTokens:
    """Tokens as experts read them, and where the float router sends each.

    Attributes:
        rows: float32 (tokens, hidden), what the norm before the router gives.
        chosen: int64 (tokens, per token), the experts.
        weights: float32 of the same, what their outputs are multiplied by.
    """

    rows: np.ndarray
    chosen: np.ndarray
    weights: np.ndarray

    def of(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows that one expert reads, in order, and float32 (rows, 1), its weights."""
        tokens, at_token = np.nonzero(self.chosen == expert)
        return self.rows[tokens], self.weights[tokens, at_token, None]


class SearchWindows:
    """Float activations of the windows that searches look at: before, within and after a block.

    Args:
        shape: (windows, tokens, hidden) of all there is.
        states: how many there are of a block: its input, and what each branch gives.
        tokens: searches look at this many tokens at most, but at one window at least, unless it is
            0; the windows are spread evenly over all.
        apart: at half of the windows at most: the others make the ranges of candidates.

    Attributes:
        states: float32 (states, windows, tokens, hidden).
        routed: the same tokens as experts read them, once somebody has asked.
    """

    def __init__(
        self, shape: tuple[int, int, int], states: int, tokens: int, *, apart: bool = False
    ):
        count, self.length, hidden = shape
        self.shape, self.tokens, self.apart = shape, tokens, apart
        most = (count + 1) // 2 if apart else count
        wanted = min(most, max(1, tokens // self.length)) if tokens else 0
        self.chosen = spread(count, wanted)
        self.states = np.empty((states, wanted, self.length, hidden), np.float32)
        self.routed: RoutedTokens | None = None

    def holds(self, start: int, count: int) -> np.ndarray:
        """bool (count,): which of the windows from ``start`` on searches look at."""
        return np.isin(np.arange(start, start + count), self.chosen)

    def add(self, start: int, *states: np.ndarray, first: int = 0) -> None:
        """Keeps what was chosen of a batch that begins with window ``start``: its states from the
        one of a number on."""
        begin, end = np.searchsorted(self.chosen, [start, start + len(states[0])])
        for kept, state in zip(self.states[first:], states, strict=False):
            kept[begin:end] = state[self.chosen[begin:end] - start]

    def merge(self, other: SearchWindows, first: int) -> None:
        """Takes the states of the windows from ``first`` on from another part of the data."""
        begin = int(np.searchsorted(self.chosen, first))
        self.states[:, begin:] = other.states[:, begin:]

    def batches(self, budget: Budget) -> Iterator[np.ndarray]:
        """The states of some windows at a time."""
        step = budget.windows(self.length)
        for start in range(0, len(self.chosen), step):
            yield self.states[:, start : start + step]


Candidate = Mapping[str, QuantizedLinear]


class CandidateErrors(ABC):
    """What candidates in place of a group's float linears change in some output; 0 where no token
    that searches look at comes to the group."""

    def mse(self, candidate: Candidate) -> float:
        """Mean squared error of the output."""
        squares = [(np.square(e).sum(dtype=np.float64), e.size) for e, _ in self.pairs(candidate)]
        size = sum(size for _, size in squares)
        return float(sum(square for square, _ in squares) / size) if size else 0.0

    def relative_mse(self, candidate: Candidate) -> float:
        """Squared error over squared output of a token, in the mean over tokens."""
        shares = token_shares(self.pairs(candidate))
        return float(shares.mean()) if shares.size else 0.0

    def token_error(self, candidate: Candidate) -> float:
        """See :func:`~ms_quant.statistics.errors.token_error`; of linears that tell prefill and
        decode apart that in decode, where their input's range is static."""
        shares = token_shares(self.pairs(candidate, decode=True))
        return token_error(shares) if shares.size else 0.0

    @abstractmethod
    def pairs(
        self, candidate: Candidate, decode: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Error and float output, of some tokens at a time."""


class BlockErrors(CandidateErrors):
    """What candidates in place of a group's float linears change in the block's output.

    Args:
        block: the float block.
        at: the positions of a window's tokens.
        group: the group.
        windows: the activations that are looked at.
    """

    def __init__(
        self, block: BlockForward, at: Positions, group: LinearGroup, windows: SearchWindows
    ):
        self.block, self.at, self.group, self.windows = block, at, group, windows
        self.which = block.spec.branch_of(group)
        self.last = len(block.spec.branches)

    def pairs(
        self, candidate: Candidate, decode: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Error and float output, of some windows at a time."""
        outputs = self.outputs(forwards(candidate, decode))
        for states, output in zip(self._batches(), outputs, strict=True):
            yield output - states[self.last], states[self.last]

    def outputs(self, linears: Mapping[str, Linear]) -> Iterator[np.ndarray]:
        """The block's output with what computes some linears, of some windows at a time."""
        block = self.block.with_linears(linears)
        for states, inputs in zip(self._batches(), self._inputs, strict=True):
            yield self._output(block, states, inputs)

    @cached_property
    def _inputs(self) -> list[Any]:
        """What the last linears of the group's branch read, if the group is among them: no
        candidate changes it."""
        last = self.block.spec.branches[self.which].last
        if not set(self.group.members) <= set(last):
            return [None for _ in self._batches()]
        return [self._made(self.block, states) for states in self._batches()]

    def _batches(self) -> Iterator[np.ndarray]:
        return self.windows.batches(self.block.budget)

    def _made(self, block: BlockForward, states: np.ndarray) -> Any:
        return block.inner(self.which, states[self.which], self.at)

    def _output(self, block: BlockForward, states: np.ndarray, inputs: Any) -> np.ndarray:
        inputs = self._made(block, states) if inputs is None else inputs
        after = block.add(self.which, states[self.which], inputs)
        if self.last == self.which + 1:
            return after
        return block.run(after, self.at, first=self.which + 1)


class BranchErrors(BlockErrors):
    """The same in the residual stream right after the group's own branch: what is behind that,
    experts that nothing else needs, is neither read nor run."""

    def __init__(
        self, block: BlockForward, at: Positions, group: LinearGroup, windows: SearchWindows
    ):
        super().__init__(block, at, group, windows)
        self.last = self.which + 1


def forwards(candidate: Candidate, decode: bool) -> dict[str, Linear]:
    """What computes candidates."""
    return {path: _forward(one, decode) for path, one in candidate.items()}


def _forward(linear: QuantizedLinear, decode: bool) -> Linear:
    forward = QuantizedForward(linear)
    return partial(forward, decode=True) if decode and forward.phased else forward
