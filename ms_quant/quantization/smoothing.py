"""The smoothing of a block's groups, decided on the float weights.

A vector that has no place in the group's own tensors is folded into what makes the input: into a
norm's gain, or into the rows of the linear whose output it divides. All linears that read one
producer have one vector; the columns of those that stay float are multiplied by it. That of an
input that experts read is decided without their weights (:mod:`ms_quant.quantization.folding`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from ms_quant.algorithms.problem import InputMaxima, Problem, Solution
from ms_quant.errors import BadFileError
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.edge import Edge
from ms_quant.models.names import block_prefix
from ms_quant.numerics.activation import DualMxTokens
from ms_quant.numerics.linear import QuantizedLinear, stable_smooth
from ms_quant.numerics.storage import DTYPES
from ms_quant.plan.folding import folded_edges, quantized_readers
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan
from ms_quant.quantization.folding import fold, fold_for_experts, with_weights
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
        maxima: gives what is known of the input of all experts, where some of them are not here.
        folded: group to what makes its input, where smoothing is folded into that.
        floats: float32 tensors that folding has changed, by name.
    """

    plan: Plan
    weights: Weights
    observations: Observations | None
    hooks: BlockHooks
    only: Collection[str] | None = None
    maxima: Callable[[], InputMaxima] | None = None
    folded: dict[str, Edge] = field(init=False)
    floats: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.index, self.prefix = self.weights.index, block_prefix(self.weights.index)
        folded, only = folded_edges(self.plan, self.index), self.only
        self.folded = {n: edge for n, edge in folded.items() if only is None or n in only}
        self._for_experts = {e.producer: e for e in folded.values() if self._feeds_experts(e)}
        self._problems: dict[str, Problem] = {}
        self._shared: dict[str, Solution] = {}

    @cached_property
    def wanted(self) -> list[LinearGroup]:
        """The quantized groups that are looked at."""
        groups, only = self.plan.groups(self.index), self.only
        return [group for group in groups if only is None or group.name in only]

    def groups(self) -> Iterator[Smoothed]:
        """Every quantized group that is looked at, in order."""
        if not self._is_expert and self.observations is not None:
            for edge in self._for_experts.values():
                self._fold_for_experts(edge)
        for group in self.wanted:
            yield self._of(group)

    @cached_property
    def _is_expert(self) -> bool:
        """Whether only an expert is looked at: what all of them share changes with the others."""
        return self.only is not None and any(group.routed for group in self.wanted)

    def _of(self, group: LinearGroup) -> Smoothed:
        edge = self.folded.get(group.name)
        if edge is None:
            return Smoothed(group, problem := self._problem(group), self._own(group, problem))
        if edge.producer in self._for_experts:
            return self._of_experts(group, edge)
        if edge.producer not in self._shared:
            self._shared[edge.producer] = self._joint(edge)
        return Smoothed(group, self._problems.pop(group.name), self._shared[edge.producer])

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
        smooth, floats = fold(self.plan, self.index, edge, solution.smooth, self.weights.get)
        self.floats.update(floats)
        return replace(solution, smooth=smooth)

    def _feeds_experts(self, edge: Edge) -> bool:
        spec = self.plan.config.block(self.index)
        return edge.norm and any(spec.group(name).routed for name in edge.consumers)

    def _of_experts(self, group: LinearGroup, edge: Edge) -> Smoothed:
        """A group of experts, or one that reads what they read: their one vector is decided without
        weights, and what else its algorithms do in this stage on its own."""
        shared = self._fold_for_experts(edge)
        problem = replace(self._problem(group), smoothing=False)
        solution = self.plan.layer(self.index, group).algorithms.first(problem)
        note = {**solution.note, **shared.note}
        return Smoothed(group, problem, replace(solution, smooth=shared.smooth, note=note))

    def _fold_for_experts(self, edge: Edge) -> Solution:
        if edge.producer not in self._shared:
            found = fold_for_experts(
                self.plan,
                self.index,
                edge,
                self.maxima or partial(self._maxima, edge),
                self.weights.get,
            )
            self._shared[edge.producer] = found.solution
            if not self._is_expert:
                self.floats.update(found.floats)
        return self._shared[edge.producer]

    def _maxima(self, edge: Edge) -> InputMaxima:
        """What is known of an input that experts read."""
        assert self.observations is not None
        seen = self.observations.stats
        names = quantized_readers(self.plan, self.index, edge)
        came = np.maximum.reduce([seen[name].absmax for name in names if seen[name].tokens])
        return with_weights(
            self.plan,
            self.index,
            edge,
            came,
            lambda member, group: self._weight(member, seen[group.name]),
        )

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
            stats=None if self.observations is None else self.observations.stats[groups[0].name],
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
            weights[member] = self._weight(member, stats)
            bias = self.weights.get(f"{member}.bias")
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

    def _weight(self, member: str, stats: ActivationStats | None) -> np.ndarray:
        weight = self.weights.get(f"{member}.weight")
        assert weight is not None
        if self.hooks.transform:
            weight = self.hooks.transform(f"{self.prefix}{member}", weight, stats)
        return weight


def _no_loss(candidate: Mapping[str, QuantizedLinear]) -> float:
    raise AssertionError("an algorithm without calibration asked for an error")


def _own_product(layer: LayerPlan) -> bool:
    """Whether linears multiply their inputs by a vector, or scale long blocks of them."""
    own = layer.storage.target is SmoothingTarget.MUL_SCALE
    return own or isinstance(layer.scheme.activation, DualMxTokens)
