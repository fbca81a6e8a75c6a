"""Quantizing the linears of one block: the part that needs no network to run.

First every group's smoothing is decided, on the float weights. Where it has no place in the
group's own tensors it is folded into what comes before: into a norm's gain, or into the rows of
the linear whose output it divides. Then the weights, so changed, are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ms_quant.algorithms.problem import Loss, Problem, Solution, apply
from ms_quant.files.reader import FloatTensors
from ms_quant.job.directory import JobDirectory
from ms_quant.models.block_spec import BlockSpec, Edge, LinearGroup
from ms_quant.models.names import block_prefix
from ms_quant.numerics import kv_cache
from ms_quant.numerics.activation import DualMxTokens
from ms_quant.numerics.linear import QuantizedLinear, stable_smooth
from ms_quant.numerics.storage import DTYPES
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan
from ms_quant.schemes.storage import SmoothingTarget
from ms_quant.statistics.observers import ActivationStats

Progress = Callable[[int, float], None]
"""Called with a block's index and how much of it is done, 0 to 1."""

Array = Callable[[str], np.ndarray | None]
"""Gives a float32 parameter of the block by its name, or None when it has none of that name."""

WeightTransform = Callable[[str, np.ndarray, ActivationStats | None], np.ndarray]
"""Called with a linear's full path, its float32 weight and its input's statistics."""


Rounding = Callable[[Problem, Solution], tuple[dict[str, QuantizedLinear], dict[str, Any]]]
"""Makes the linears of a group, and notes about them for the report. It sees the Hessian."""


@dataclass(frozen=True)
class BlockHooks:
    """What another command puts around the algorithm.

    Attributes:
        transform: changes a weight before it is quantized (pruning).
        rounding: what makes int8 linears of the algorithm's answer; None rounds to nearest.
    """

    transform: WeightTransform | None = None
    rounding: Rounding | None = None


NO_HOOKS = BlockHooks()


@dataclass(frozen=True)
class Seen:
    """What calibration has seen of a group.

    Attributes:
        stats: statistics of its input.
        loss: error of the block's output with candidates in place of the float linears.
        relative_mse: the same relative to the output of each token.
        floor: float32 (in,), the least a vector may be that the model's activations are divided
            by; less would bring them near the end of float16. None where that does not matter.
    """

    stats: ActivationStats | None
    loss: Loss
    relative_mse: Loss
    floor: np.ndarray | None = None


@dataclass
class Block:
    """A quantized block.

    Attributes:
        linears: path to quantized linear.
        floats: float32 tensors that folding has changed, by name.
        notes: group to what was chosen.
        cache: path to float32 scales of a linear's outputs in a cache of int8.
        ranges: how large activations get, see :mod:`ms_quant.statistics.activation_range`.
    """

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    floats: dict[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    cache: dict[str, np.ndarray] = field(default_factory=dict)
    ranges: dict[str, Any] = field(default_factory=dict)


class Smoothed(NamedTuple):
    """A group whose smoothing is decided."""

    group: LinearGroup
    problem: Problem
    solution: Solution


def quantize_block(
    plan: Plan,
    index: int,
    array: Array,
    seen: Callable[[LinearGroup], Seen],
    hooks: BlockHooks = NO_HOOKS,
    progress: Callable[[float], None] = lambda part: None,
    cached: Mapping[str, np.ndarray] | None = None,
) -> Block:
    """The quantized linears of one block, and what the algorithms chose.

    Args:
        plan: what to do.
        index: of the block.
        array: its float parameters.
        seen: what calibration has seen of a group.
        hooks: what is done around the algorithms.
        progress: told how much is done, 0 to 1.
        cached: float32 (out,), the largest magnitude of each output that is cached, by path.
    """
    block, count, spec = Block(), len(plan.groups(index)), plan.config.block(index)
    folding = {group.name for group in plan.groups(index) if plan.layer(index, group).folds}
    several = bool(folding)  # then weights wait for the smoothing of what they feed

    def smoothed() -> Iterator[Smoothed]:
        for done, group in enumerate(plan.groups(index)):
            looked = seen(group)
            problem = _problem(plan, index, group, array, looked, hooks)
            layer = plan.layer(index, group)
            solution = _floored(layer, looked, problem)
            own = layer.storage.target is SmoothingTarget.MUL_SCALE
            if own and solution.smooth is not None:
                solution = replace(solution, smooth=stable_smooth(solution.smooth, plan.dtype))
            if group.name in folding and solution.smooth is not None:
                edge = spec.producer_of(group)
                assert edge is not None, group.name
                smooth = _fold(plan, edge, array, block.floats, solution.smooth)
                solution = replace(solution, smooth=smooth)
            yield Smoothed(group, problem, solution)
            if several:
                progress((done + 1) / count / 2)

    # Without folding one group's weights after the other are in memory.
    pending = list(smoothed()) if several else smoothed()
    divisors = _divisors(spec, pending, folding) if isinstance(pending, list) else {}
    for done, (group, problem, solution) in enumerate(pending):
        if several:
            problem = _with_scaled_rows(problem, divisors, block.floats)
        if hooks.rounding is None:
            solution = plan.layer(index, group).algorithms.rest(problem, solution)
            linears, note = apply(problem, solution), dict(solution.note)
        else:
            linears, note = hooks.rounding(problem, solution)
            note = {**solution.note, **note}
        if group.name in folding:
            linears = {path: replace(linear, smooth=None) for path, linear in linears.items()}
        block.linears.update(linears)
        block.notes[group.name] = note
        progress((done + 1) / count if not several else (1 + (done + 1) / count) / 2)
    for path, absmax in (cached or {}).items():
        name = f"{block_prefix(index)}{path}: cached output"
        block.cache[path] = kv_cache.channel_scale(absmax / divisors.get(path, 1), plan.dtype, name)
    return block


def _floored(layer: LayerPlan, seen: Seen, problem: Problem) -> Solution:
    """The smoothing of a group, nowhere so small that what it divides leaves float16."""
    solution = layer.algorithms.first(problem)
    inside = layer.storage.target is SmoothingTarget.INPUT_SCALE
    if solution.smooth is None or seen.floor is None or inside:
        return solution
    return replace(solution, smooth=np.maximum(solution.smooth, seen.floor))


def _problem(
    plan: Plan, index: int, group: LinearGroup, array: Array, seen: Seen, hooks: BlockHooks
) -> Problem:
    prefix = block_prefix(index)
    weights, biases = {}, {}
    for member in group.members:
        weight, bias = array(f"{member}.weight"), array(f"{member}.bias")
        assert weight is not None
        if hooks.transform:
            weight = hooks.transform(prefix + member, weight, seen.stats)
        weights[member] = weight
        if bias is not None:
            biases[member] = bias
    layer = plan.layer(index, group)
    inside = layer.storage.target is not SmoothingTarget.NORM
    edge = None if inside else plan.producer(index, group)
    return Problem(
        name=f"{prefix}{group.fused}",
        scheme=layer.scheme,
        weights=weights,
        biases=biases,
        stats=seen.stats,
        dtype=plan.dtype,
        loss=seen.loss,
        relative_mse=seen.relative_mse,
        smoothing=inside or edge is not None,
        shared=(edge.repeats, edge.size) if edge else (1, 1),
        scores=frozenset(path for path, linear in group.linears.items() if linear.scores),
        input_dtype=plan.dtype if _own_product(layer) else DTYPES["float32"],
        scale_type=layer.storage.scale_type,
    )


def _own_product(layer: LayerPlan) -> bool:
    """Whether linears multiply their inputs by a vector, or scale long blocks of them."""
    own = layer.storage.target is SmoothingTarget.MUL_SCALE
    return own or isinstance(layer.scheme.activation, DualMxTokens)


def _fold(
    plan: Plan,
    edge: Edge,
    array: Array,
    floats: dict[str, np.ndarray],
    smooth: np.ndarray,
) -> np.ndarray:
    """Divides what feeds a group by its smoothing vector.

    A norm's gain is divided here, and the vector redefined by what is stored of it; the rows of a
    linear are divided when it is rounded.

    Returns:
        float32 (in,), what the weights' columns are multiplied by.
    """
    if not edge.norm:
        return smooth
    name = f"{edge.producer}.weight"
    gain = array(name)
    assert gain is not None
    with np.errstate(over="ignore"):
        stored = (gain / smooth).astype(plan.dtype).astype(np.float32)
        plain = gain.astype(plan.dtype).astype(np.float32)  # where nothing can fold
    stored = np.where((stored != 0) & np.isfinite(stored), stored, plain)
    live = (stored != 0) & np.isfinite(stored)
    floats[name] = np.where(live, stored, gain)
    return np.where(live, gain / np.where(live, stored, 1), np.float32(1)).astype(np.float32)


def _divisors(
    spec: BlockSpec, consumers: Iterable[Smoothed], folding: Container[str]
) -> dict[str, np.ndarray]:
    """Path of a linear to float32 (out,), the smoothing of what it feeds."""
    divisors = {}
    for group, _, solution in consumers:
        edge = spec.producer_of(group)
        if group.name in folding and edge and not edge.norm and solution.smooth is not None:
            divisors[edge.producer] = edge.rows(solution.smooth)
    return divisors


def _with_scaled_rows(
    problem: Problem, divisors: Mapping[str, np.ndarray], floats: dict[str, np.ndarray]
) -> Problem:
    """The problem with the rows of its linears divided by the smoothing of what they feed."""
    weights, biases = dict(problem.weights), dict(problem.biases)
    for path, rows in divisors.items():
        if path not in weights:
            continue
        weights[path] = weights[path] / rows[:, None]
        if path in biases:
            biases[path] = biases[path] / rows
            floats[f"{path}.bias"] = biases[path]
    return replace(problem, weights=weights, biases=biases)


Target = tuple[Plan, JobDirectory]
"""A plan for one format, and the job as it has that format's blocks."""


def finish_targets(
    targets: Sequence[Target],
    index: int,
    make: Callable[[Plan, Callable[[float], None]], Block],
    statistics: Mapping[str, np.ndarray],
    progress: Callable[[float], None],
) -> None:
    """Makes a block of each format from the same calibration and commits them.

    Args:
        targets: the formats. The first one's block is committed last: it says that all are there.
        index: of the block.
        make: makes the block of a plan; the second argument is told how much is done.
        statistics: of the block, kept with the first.
        progress: told how much of all is done, 0 to 1.
    """
    done: list[tuple[Plan, Block]] = []
    for count, (plan, job) in enumerate(reversed(targets)):
        block = next((block for other, block in done if plan.same_numbers(other)), None)
        if block is None:
            block = make(plan, partial(_share, progress, count, len(targets)))
            done.append((plan, block))
        job.finish_block(index, block, statistics if job.target == 0 else {})


def _share(progress: Callable[[float], None], done: int, of: int, part: float) -> None:
    progress((done + part) / of)


def quantize_data_free(
    targets: Sequence[Target], checkpoint: FloatTensors, progress: Progress
) -> None:
    """Quantizes every unfinished block of a job that needs no calibration."""
    plan, job = targets[0]
    for index in range(job.finished_blocks(), plan.config.num_layers):
        prefix = block_prefix(index)

        def array(name: str, prefix: str = prefix) -> np.ndarray | None:
            return checkpoint.read_float32(prefix + name) if name.endswith("weight") else None

        def done(part: float, index: int = index) -> None:
            progress(index, part)

        def make(
            plan: Plan, part: Callable[[float], None], index: int = index, array: Array = array
        ) -> Block:
            return quantize_block(plan, index, array, _unseen, NO_HOOKS, part)

        finish_targets(targets, index, make, {}, done)


def _unseen(group: LinearGroup) -> Seen:
    return Seen(None, _no_loss, _no_loss)


def _no_loss(candidate: Mapping[str, QuantizedLinear]) -> float:
    raise AssertionError("an algorithm without calibration asked for a loss")
