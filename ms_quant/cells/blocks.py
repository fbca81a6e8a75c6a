"""Blocks of a network: Cells whose output tells how good candidates inside them are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from ms_quant.budget import SEARCH_TOKENS
from ms_quant.cells import timesteps
from ms_quant.cells.calls import IN_MEMORY, Call, CallStore
from ms_quant.cells.recorder import float32
from ms_quant.cells.tree import get_cell, is_linear, linears, replaced
from ms_quant.errors import BadArgumentError
from ms_quant.models.linear_forward import QuantizedForward
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.recipe.patterns import matches, unmatched
from ms_quant.statistics.errors import token_error, token_shares
from ms_quant.statistics.kept import spread
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig

WEIGHT = ".weight"
"""Candidates are named by their weight, a path with this ending."""


def listed_blocks(network: nn.Cell) -> list[str]:
    """Paths of the elements of CellLists and SequentialCells that hold two linears or more."""
    found = []
    for path, cell in network.cells_and_names():
        if isinstance(cell, nn.CellList | nn.SequentialCell):
            found += [
                f"{path}.{name}" if path else name
                for name, child in cell._cells.items()
                if not is_linear(child) and len(list(linears(child))) > 1
            ]
    return found


def stated_blocks(network: nn.Cell, patterns: Sequence[str]) -> list[str]:
    """Paths of the Cells that patterns match, without those inside others: ``layers.*`` matches
    all that is inside ``layers.0``, too.

    Raises:
        MsQuantError: a pattern matches no Cell that holds a linear.
    """
    paths = [path for path, cell in network.cells_and_names() if path and any(linears(cell))]
    for pattern in unmatched(patterns, paths):
        shown = ", ".join(paths[:4])
        raise BadArgumentError(
            f"blocks: {pattern!r} matches no Cell that holds linears, expected one of: {shown}, ..."
        )
    found: list[str] = []
    for path in paths:
        if matches(path, patterns) and not enclosing([path], found):
            found.append(path)
    return found


def enclosing(paths: Iterable[str], blocks: Iterable[str]) -> str:
    """The innermost block that holds all of some paths, "" where there is none."""
    wanted = list(paths)
    around = [b for b in blocks if all(path.startswith(f"{b}.") for path in wanted)]
    return max(around, key=len, default="")


def blocks_of(
    groups: Sequence[tuple[str, ...]], kept: Mapping[str, CallStore], *, stated: bool
) -> dict[tuple[str, ...], str]:
    """The block whose output counts for each group; one of a list only if some of its linears
    share an input, as those of attention do.

    Args:
        groups: paths of the linears of each.
        kept: path of a block to its kept calls.
        stated: whether the user said which Cells are blocks.
    """
    blocks = [path for path, calls in kept.items() if len(calls)]
    found = {group: enclosing(group, blocks) for group in groups}
    if stated:
        return found
    shares = {block for g in groups if len(g) > 1 for block in blocks if enclosing(g, [block])}
    return {group: block if block in shares else "" for group, block in found.items()}


def chosen_calls(count: int, tokens: int) -> np.ndarray:
    """The calls of a network from which those of blocks are kept: of ``count`` calls over
    ``tokens`` tokens some that are evenly spread, at least one."""
    return spread(count, min(count, max(1, SEARCH_TOKENS * count // max(1, tokens))))


class BlockCalls:
    """Keeps calls of blocks, for searches, while the network is called.

    Args:
        network: what is called.
        blocks: paths of its blocks.
        calls: of the network.

    Attributes:
        chosen: which of them the kept ones are of.
        kept: path of a block to its kept calls.
    """

    def __init__(self, network: nn.Cell, blocks: Iterable[str], calls: CallStore):
        self.chosen = chosen_calls(len(calls), calls.tokens).tolist()
        self._index = 0
        paths = list(blocks)
        self.kept = {path: CallStore(IN_MEMORY // len(paths)) for path in paths}
        self._hooks = [
            get_cell(network, path).register_forward_pre_hook(self._keeper(store), with_kwargs=True)
            for path, store in self.kept.items()
        ]

    def begin_call(self, index: int) -> None:
        self._index = index

    def remove(self) -> None:
        """Leaves the blocks as they were."""
        for hook in self._hooks:
            hook.remove()

    def _keeper(self, store: CallStore) -> Callable[[nn.Cell, tuple, dict[str, Any]], None]:
        chosen = frozenset(self.chosen)

        def keep(cell: nn.Cell, arguments: tuple, named: dict[str, Any]) -> None:
            if self._index in chosen:
                step = TimestepManager.get_timestep_idx()
                store.append(Call(arguments, named, step, self._index))

        return keep


Candidate = Mapping[str, QuantizedLinear]


class BlockErrors:
    """What candidates in place of float linears change in the output of their block.

    Args:
        network: whose block it is; its parameters are float32.
        path: of the block.
        calls: of it that are made again.
        policy: which timesteps are static, of linears of timesteps.
    """

    def __init__(
        self, network: nn.Cell, path: str, calls: CallStore, policy: TimestepPolicyConfig | None
    ):
        self.path, self.policy = path, policy
        self._block, self._calls = get_cell(network, path), calls

    def mse(self, candidate: Candidate) -> float:
        """Mean squared error of the block's output."""
        squares = [(np.square(e).sum(dtype=np.float64), e.size) for e, _ in self._pairs(candidate)]
        return float(sum(square for square, _ in squares) / sum(size for _, size in squares))

    def relative_mse(self, candidate: Candidate) -> float:
        """Squared error over squared output of a token, in the mean over tokens."""
        return float(token_shares(self._pairs(candidate)).mean())

    def token_error(self, candidate: Candidate) -> float:
        """See :func:`~ms_quant.statistics.errors.token_error`."""
        return token_error(token_shares(self._pairs(candidate)))

    def _pairs(self, candidate: Candidate) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Error and float output."""
        cells = {
            name.removesuffix(WEIGHT).removeprefix(f"{self.path}."): self._cell(linear)
            for name, linear in candidate.items()
        }
        kept = self._exact
        with replaced(self._block, cells):
            for call, outputs in kept:
                for found, exact in zip(self._outputs(call), outputs, strict=True):
                    yield found - exact, exact

    def _cell(self, linear: QuantizedLinear) -> nn.Cell:
        if self.policy is None:
            return _Candidate(QuantizedForward(linear))
        return _Candidate(partial(self._at_step, linear, self.policy))

    def _at_step(
        self, linear: QuantizedLinear, policy: TimestepPolicyConfig, rows: np.ndarray
    ) -> np.ndarray:
        step = timesteps.current_step(self.path)
        return linear.forward(rows, step=step if timesteps.is_static(policy, step) else None)

    @cached_property
    def _exact(self) -> list[tuple[Call, list[np.ndarray]]]:
        return [(call, [y.copy() for y in self._outputs(call)]) for call in self._calls]

    def _outputs(self, call: Call) -> list[np.ndarray]:
        TimestepManager.set_timestep_idx(call.step)
        return list(_floats(self._block(*call.arguments, **call.named)))


class _Candidate(nn.Cell):
    """A quantized linear for a while: a function of float32 rows."""

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]):
        super().__init__()
        self.function = function

    def construct(self, x: Tensor) -> Tensor:
        array = float32(x)
        rows = np.ascontiguousarray(array.reshape(-1, array.shape[-1]))
        return Tensor.from_numpy(self.function(rows).reshape(*array.shape[:-1], -1))


def _floats(value: Any) -> Iterator[np.ndarray]:
    """The float tensors of an output, in lists, tuples and dicts, as float32."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.ndim:
            yield float32(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _floats(item)
