"""The smoothing of a block's groups, decided on the float weights.

A vector that has no place in the group's own tensors is folded into what makes the input: into a
norm's gain, or into the rows of the linear whose output it divides. All linears that read one
producer have one vector; the columns of those that stay float are multiplied by it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ms_quant.algorithms.problem import Problem, Solution
from ms_quant.errors import BadFileError
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.edge import Edge
from ms_quant.models.names import block_prefix
from ms_quant.numerics.activation import DualMxTokens
from ms_quant.numerics.linear import QuantizedLinear, stable_smooth
from ms_quant.numerics.storage import DTYPES
from ms_quant.plan.folding import float_readers, folded_edges, quantized_readers
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan
from ms_quant.quantization.hooks import BlockHooks
from ms_quant.quantization.weights import Errors, Weights
from ms_quant.schemes.storage import SmoothingTarget
from ms_quant.statistics.observations import Observations
from ms_quant.statistics.observers import ActivationStats


class Smoothed(NamedTuple):
    """A group whose smoothing is decided."""

    group: LinearGroup
    problem: Problem
    solution: Solution


@dataclass
class BlockSmoothing:
    """The smoothing of the quantized groups of a block.

    Attributes:
        plan: what to do.
        weights: the block's float parameters.
        observations: what calibration has seen of it; None without calibration.
        hooks: what is done around the algorithms.
        only: names of the groups that are looked at; None for all.
        folded: group to what makes its input, where smoothing is folded into that.
        floats: float32 tensors that folding has changed, by name.
    """

    plan: Plan
    weights: Weights
    observations: Observations | None
    hooks: BlockHooks
    only: Collection[str] | None = None
    folded: dict[str, Edge] = field(init=False)
    floats: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.index, self.prefix = self.weights.index, block_prefix(self.weights.index)
        folded, only = folded_edges(self.plan, self.index), self.only
        self.folded = {n: edge for n, edge in folded.items() if only is None or n in only}
        self._problems: dict[str, Problem] = {}
        self._shared: dict[str, Solution] = {}

    @cached_property
    def wanted(self) -> list[LinearGroup]:
        """The quantized groups that are looked at."""
        groups, only = self.plan.groups(self.index), self.only
        return [group for group in groups if only is None or group.name in only]

    def groups(self) -> Iterator[Smoothed]:
        """Every quantized group that is looked at, in order."""
        for group in self.wanted:
            edge = self.folded.get(group.name)
            if edge is None:
                yield Smoothed(group, problem := self._problem(group), self._own(group, problem))
                continue
            if edge.producer not in self._shared:
                self._shared[edge.producer] = self._joint(edge)
            yield Smoothed(group, self._problems.pop(group.name), self._shared[edge.producer])

    def divisors(self, groups: Iterable[Smoothed]) -> dict[str, np.ndarray]:
        """Path of a linear to float32 (out,), the smoothing of what it feeds."""
        divisors = {}
        for group, _, solution in groups:
            edge = self.folded.get(group.name)
            if edge is not None and not edge.norm and solution.smooth is not None:
                divisors[edge.producer] = edge.rows(solution.smooth)
        return divisors

    def with_scaled_rows(self, problem: Problem, divisors: Mapping[str, np.ndarray]) -> Problem:
        """The problem with the rows of its linears divided by the smoothing of what they feed."""
        weights, biases = dict(problem.weights), dict(problem.biases)
        for path, rows in divisors.items():
            if path not in weights:
                continue
            weights[path] = weights[path] / rows[:, None]
            if path in biases:
                biases[path] = biases[path] / rows
                self.floats[f"{path}.bias"] = biases[path]
        return replace(problem, weights=weights, biases=biases)

    def _own(self, group: LinearGroup, problem: Problem) -> Solution:
        """The solution of a group that has its vector, if there is one, in its own tensors."""
        layer = self.plan.layer(self.index, group)
        solution = layer.algorithms.first(problem)
        if layer.storage.target is not SmoothingTarget.INPUT_SCALE:
            solution = self._floored(solution, [group])
        if layer.storage.target is SmoothingTarget.MUL_SCALE and layer.algorithms.any("smooths"):
            smooth = solution.smooth  # where none was best, the linear multiplies by ones
            smooth = np.ones(group.in_features, np.float32) if smooth is None else smooth
            solution = replace(solution, smooth=stable_smooth(smooth, self.plan.dtype))
        return solution

    def _joint(self, edge: Edge) -> Solution:
        """The solution of all groups that read what a producer makes, folded into it."""
        spec = self.plan.config.block(self.index)
        groups = [spec.group(name) for name in quantized_readers(self.plan, self.index, edge)]
        self._problems |= {group.name: self._problem(group) for group in groups}
        first = next(g for g in groups if self.plan.layer(self.index, g).folds)
        problem = self._problems[first.name]
        if len(groups) > 1:
            problem = self._joined(edge, problem, groups)
        solution = self.plan.layer(self.index, first).algorithms.first(problem)
        solution = self._floored(solution, groups)
        if solution.smooth is None:
            return solution
        smooth = self._fold(edge, solution.smooth)
        for path in float_readers(self.plan, self.index, edge):
            weight = self.weights.get(name := f"{path}.weight")
            assert weight is not None, name
            self.floats[name] = weight * smooth
        return replace(solution, smooth=smooth)

    def _joined(self, edge: Edge, first: Problem, groups: Sequence[LinearGroup]) -> Problem:
        """One problem of several groups that read one input."""
        problems = [self._problems[group.name] for group in groups]
        linears = {path: spec for group in groups for path, spec in group.linears.items()}
        errors = self._errors(replace(groups[0], linears=linears))
        return replace(
            first,
            name=f"{self.prefix}{edge.producer}",
            weights={path: weight for one in problems for path, weight in one.weights.items()},
            biases={path: bias for one in problems for path, bias in one.biases.items()},
            stats=None if self.observations is None else _all_tokens(self.observations, groups),
            **errors._asdict(),
            scores=frozenset(path for one in problems for path in one.scores),
            unsearched=next((p.unsearched for p in problems if p.unsearched is not None), None),
        )

    def _floored(self, solution: Solution, groups: Sequence[LinearGroup]) -> Solution:
        """A vector nowhere so small that what it divides leaves float16."""
        seen, narrow = self.observations, self.plan.dtype.name == "float16"
        if solution.smooth is None or seen is None or not narrow:
            return solution
        spec = self.plan.config.block(self.index)
        floors = [seen.ranges.floor(spec, group) for group in groups]
        return replace(solution, smooth=np.maximum.reduce([solution.smooth, *floors]))

    def _errors(self, group: LinearGroup) -> Errors:
        if self.observations is None:
            return Errors(_no_loss, _no_loss, _no_loss)
        return self.weights.errors(group, self.observations.windows)

    def _problem(self, group: LinearGroup) -> Problem:
        layer = self.plan.layer(self.index, group)
        stats = None if self.observations is None else self.observations.stats[group.name]
        if stats is not None and not stats.tokens:
            raise BadFileError(
                f"{self.prefix}{group.members[0]}: no token of the calibration data reaches it, "
                "expected some: take more data, or leave it float"
            )
        weights, biases = {}, {}
        for member in group.members:
            weight, bias = self.weights.get(f"{member}.weight"), self.weights.get(f"{member}.bias")
            assert weight is not None
            if self.hooks.transform:
                weight = self.hooks.transform(f"{self.prefix}{member}", weight, stats)
            weights[member] = weight
            if bias is not None:
                biases[member] = bias
        inside = layer.storage.target is not SmoothingTarget.NORM
        edge = None if inside else self.plan.producer(self.index, group)
        return Problem(
            name=f"{self.prefix}{group.fused}",
            scheme=layer.scheme,
            weights=weights,
            biases=biases,
            stats=stats,
            dtype=self.plan.dtype,
            **self._errors(group)._asdict(),
            smoothing=inside or edge is not None,
            shared=(edge.repeats, edge.size) if edge else (1, 1),
            scores=frozenset(path for path, linear in group.linears.items() if linear.scores),
            input_dtype=self.plan.dtype if _own_product(layer) else DTYPES["float32"],
            scale_type=layer.storage.scale_type,
            unsearched=self._unsearched(group),
            gain=self._gain(group),
        )

    def _gain(self, group: LinearGroup) -> np.ndarray | None:
        """The gain of a norm that a runtime divides by the scales of a group's static input."""
        edge = self.plan.config.block(self.index).producer_of(group)
        activation = self.plan.layer(self.index, group).scheme.activation
        if edge is None or not (edge.fused and activation.holds_smoothing):
            return None
        return self.weights.get(f"{edge.producer}.weight")

    def _unsearched(self, group: LinearGroup) -> tuple[np.ndarray, np.ndarray] | None:
        found = self.observations.unsearched if self.observations is not None else {}
        return found[group.name].range if group.name in found else None

    def _fold(self, edge: Edge, smooth: np.ndarray) -> np.ndarray:
        """Divides what makes an input by a vector.

        A norm's gain is divided here, and the vector redefined by what is stored of it; the rows
        of a linear are divided when it is rounded.

        Returns:
            float32 (in,), what the weights' columns are multiplied by.
        """
        if not edge.norm:
            return smooth
        name, dtype = f"{edge.producer}.weight", self.plan.dtype
        gain = self.weights.get(name)
        assert gain is not None
        with np.errstate(over="ignore"):
            stored = (gain / smooth).astype(dtype).astype(np.float32)
            plain = gain.astype(dtype).astype(np.float32)  # where nothing can fold
        stored = np.where((stored != 0) & np.isfinite(stored), stored, plain)
        live = (stored != 0) & np.isfinite(stored)
        self.floats[name] = np.where(live, stored, gain)
        return np.where(live, gain / np.where(live, stored, 1), np.float32(1)).astype(np.float32)


def _all_tokens(seen: Observations, groups: Sequence[LinearGroup]) -> ActivationStats:
    """Statistics of an input over all tokens, of which a routed group sees only some."""
    whole = next((group for group in groups if not group.routed), None)
    if whole is not None:
        return seen.stats[whole.name]
    merged = deepcopy(seen.stats[groups[0].name])
    for group in groups[1:]:
        merged.merge(seen.stats[group.name])
    return merged


def _no_loss(candidate: Mapping[str, QuantizedLinear]) -> float:
    raise AssertionError("an algorithm without calibration asked for an error")


def _own_product(layer: LayerPlan) -> bool:
    """Whether linears multiply their inputs by a vector, or scale long blocks of them."""
    own = layer.storage.target is SmoothingTarget.MUL_SCALE
    return own or isinstance(layer.scheme.activation, DualMxTokens)
