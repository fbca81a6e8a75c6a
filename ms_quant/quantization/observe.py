"""Observing: the float forward of a block, and what must be kept of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np

from ms_quant.models.block_forward import BlockForward, Observer, Positions
from ms_quant.models.block_spec import BlockSpec
from ms_quant.models.linear_forward import Linear
from ms_quant.models.names import GroupId, block_prefix
from ms_quant.plan.plan import Plan
from ms_quant.quantization.divided import factors
from ms_quant.quantization.hooks import BlockHooks
from ms_quant.statistics.activation_range import BlockRanges, Divided, input_of, output_of
from ms_quant.statistics.observations import Observations
from ms_quant.statistics.observers import ActivationStats, CacheRange
from ms_quant.statistics.search_windows import SearchWindows
from ms_quant.statistics.unsearched import UnsearchedRange


@dataclass(frozen=True)
class GroupWanted:
    """What must be kept of the input of a group.

    Attributes:
        rows: how many tokens, at most.
        hessian: the products of channels.
        histogram: the counts of values.
        equal_tokens: in the products each token counts as any other.
    """

    rows: int
    hessian: bool
    histogram: bool
    equal_tokens: bool = True


@dataclass(frozen=True)
class Wanted:
    """What must be kept of a block.

    Attributes:
        groups: those of the groups that are quantized, by name.
        search_tokens: searches look at this many.
        cache: the ranges of what is in int8 with a cache.
        apart: candidates are tried on other windows than their ranges are made of.
    """

    groups: Mapping[str, GroupWanted]
    search_tokens: int
    cache: bool
    apart: bool = False


def wanted(plans: Sequence[Plan], index: int, hooks: BlockHooks) -> Wanted:
    """What the plans of several formats need of a block together."""
    rounds = hooks.rounding is not None
    groups = {}
    for group in plans[0].config.block(index).groups:
        layers = [plan.layers[GroupId(index, group.name)] for plan in plans]
        found = [layer.algorithms for layer in layers if layer is not None]
        if found:
            groups[group.name] = GroupWanted(
                max(algorithms.kept_tokens for algorithms in found),
                rounds or any(algorithms.any("hessian") for algorithms in found),
                any(algorithms.any("histogram") for algorithms in found),
                not rounds and any(algorithms.any("equal_tokens") for algorithms in found),
            )
    searches = rounds or any(plan.any("searches") for plan in plans)
    tokens = plans[0].search_tokens if searches else 0
    apart = bool(tokens) and any(_static_search(plan) for plan in plans)
    return Wanted(groups, tokens, bool(plans[0].cached(index)), apart)


def _static_search(plan: Plan) -> bool:
    """Whether static ranges of inputs are among what is searched for."""
    return any(
        layer.scheme.needs_calibration and layer.algorithms.any("searches")
        for layer in plan.distinct
    )


def observe(
    block: BlockForward,
    at: Positions,
    hidden: Iterable[np.ndarray],
    shape: tuple[int, int, int],
    wanted: Wanted,
    *,
    first: int = 0,
    following: Callable[[np.ndarray], None] = lambda output: None,
    inputs: Mapping[str, Observer] = MappingProxyType({}),
) -> Observations:
    """Runs a float block on windows and keeps what is wanted.

    Args:
        block: the block.
        at: the positions of a window's tokens.
        hidden: float32 (some windows, tokens, hidden) inputs of the block, in order.
        shape: (windows, tokens, hidden) of all calibration data.
        wanted: what is kept.
        first: the first window of ``hidden``.
        following: takes the outputs, in order.
        inputs: who else is shown the inputs of groups, by name.

    Raises:
        MsQuantError: an activation is NaN or infinite.
    """
    seen, start = nothing_seen(block.spec, shape, wanted, first), first
    watched = Watched(block, seen, inputs)
    for batch in hidden:
        with watched.windows(start, len(batch)):
            output = watched.block.run(batch, at)
        following(output)
        start += len(batch)
    return seen


def nothing_seen(
    spec: BlockSpec, shape: tuple[int, int, int], wanted: Wanted, first: int = 0
) -> Observations:
    """Observations of a block of which nothing was seen yet; arguments as of :func:`observe`."""
    index = spec.index
    stats = {name: _stats(spec, name, one, shape, first) for name, one in wanted.groups.items()}
    states, tokens = len(spec.hidden), wanted.search_tokens
    windows = SearchWindows(shape, states, tokens, apart=wanted.apart)
    unsearched = _unsearched(spec, wanted)
    absmax = dict[str, np.ndarray]() if wanted.cache else None
    return Observations(stats, windows, BlockRanges(index), absmax, {}, first, unsearched)


class Watched:
    """A block that shows observations what it computes.

    Args:
        block: the block, or some of its linears.
        seen: what is added to.
        inputs: who else is shown the inputs of groups, by name.

    Attributes:
        block: the same block, shown.
    """

    def __init__(
        self,
        block: BlockForward,
        seen: Observations,
        inputs: Mapping[str, Observer] = MappingProxyType({}),
    ):
        self.seen, spec, ranges = seen, block.spec, seen.ranges
        self._searched: list[np.ndarray] = []
        self._states: list[np.ndarray] = []
        taps: dict[str, list[Observer]] = {place: [self._states.append] for place in spec.hidden}
        for place in spec.hidden[spec.index > 0 :]:  # what a block reads, another has shown
            taps[place].append(partial(ranges.add, place))
        if seen.cache is not None:
            cache = CacheRange(block_prefix(spec.index), spec.cached)
            cache.absmax = seen.cache
            for path, one in spec.cached.items():
                taps.setdefault(one.tap, []).append(partial(cache.add, path))
        looks: dict[str, list[Observer]] = {name: [one.update] for name, one in seen.stats.items()}
        for name, found in seen.unsearched.items():
            looks[name].append(partial(_add, found, self._searched))
        for name, look in inputs.items():
            looks.setdefault(name, []).append(look)
        self.block = block.with_linears(_watched(block, looks, ranges)).with_taps(taps)

    @contextmanager
    def windows(self, start: int, count: int, state: int = 0) -> Iterator[None]:
        """Windows from ``start`` on pass; their states from the one of a number on are kept."""
        self._states.clear()
        self._searched[:] = [self.seen.windows.holds(start, count)]
        yield
        self.seen.windows.add(start, *self._states, first=state)


def divide(block: BlockForward, divided: Divided) -> None:
    """Changes a loaded block so that it computes the same with smaller activations."""
    for name, array in block.arrays.items():
        rows, columns = factors(block.spec, divided, name)
        if rows is not None:
            array *= rows if array.ndim == 1 else rows[:, None]
        if columns is not None:
            array *= columns


def _stats(
    spec: BlockSpec, name: str, group: GroupWanted, shape: tuple[int, int, int], first: int
) -> ActivationStats:
    (windows, length, _), members = shape, spec.group(name)
    return ActivationStats(
        members.in_features,
        None if members.routed else windows * length,
        group.rows,
        f"{block_prefix(spec.index)}{members.members[0]}: calibration input",
        group.hessian,
        group.histogram,
        first * length,
        group.equal_tokens,
    )


def _unsearched(spec: BlockSpec, wanted: Wanted) -> dict[str, UnsearchedRange]:
    """Of groups that see every token: which token a row of a routed group is, nobody says."""
    groups = {name: spec.group(name) for name in wanted.groups if wanted.apart}
    return {n: UnsearchedRange(g.in_features) for n, g in groups.items() if not g.routed}


def _add(range: UnsearchedRange, searched: Sequence[np.ndarray], rows: np.ndarray) -> None:
    range.add(rows, searched[0])


def _watched(
    block: BlockForward, looks: Mapping[str, Sequence[Observer]], ranges: BlockRanges
) -> dict[str, Linear]:
    """The linears of a block, which show what they read and write."""
    watched = {
        path: _shows_output(linear, partial(ranges.add, output_of(path)))
        for path, linear in block.linears.items()
    }
    for group in block.spec.groups:
        path = group.members[0]
        if path not in watched:
            continue
        watched[path] = shows_input(watched[path], partial(ranges.add, input_of(group)))
        for look in looks.get(group.name, ()):
            watched[path] = shows_input(watched[path], look)
    return watched


def _shows_output(linear: Linear, look: Callable[[np.ndarray], None]) -> Linear:
    def watched(rows: np.ndarray) -> np.ndarray:
        made = linear(rows)
        look(made)
        return made

    return watched


def shows_input(linear: Linear, look: Callable[[np.ndarray], None]) -> Linear:
    """The same linear, which shows what it reads."""

    def watched(rows: np.ndarray) -> np.ndarray:
        look(rows)
        return linear(rows)

    return watched
