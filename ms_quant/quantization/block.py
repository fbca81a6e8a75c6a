"""Quantizing the linears of one block: a pure function of plan, weights and observations.

First every group's smoothing is decided, on the float weights. Where it has no place in the
group's own tensors it is folded into what comes before: into a norm's gain, or into the rows of
the linear whose output it divides. Then the weights, so changed, are rounded.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ms_quant.algorithms.problem import Loss, Problem, Solution, apply
from ms_quant.models.config import ModelConfig
from ms_quant.models.families import LinearGroup
from ms_quant.models.names import block_prefix
from ms_quant.numerics import kv_cache
from ms_quant.numerics.activation import DualMxTokens
from ms_quant.numerics.linear import QuantizedLinear, stable_smooth
from ms_quant.numerics.storage import DTYPES
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan
from ms_quant.progress import PartProgress, silent
from ms_quant.quantization.hooks import NO_HOOKS, BlockHooks
from ms_quant.quantization.weights import Weights
from ms_quant.schemes.storage import SmoothingTarget
from ms_quant.statistics.observations import Observations


@dataclass
class QuantizedBlock:
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


def quantize(
    plan: Plan,
    weights: Weights,
    observations: Observations | None,
    hooks: BlockHooks = NO_HOOKS,
    progress: PartProgress = silent,
) -> QuantizedBlock:
    """The quantized linears of one block, and what the algorithms chose.

    Args:
        plan: what to do.
        weights: the block's float parameters.
        observations: what calibration has seen of it; None without calibration.
        hooks: what is done around the algorithms.
        progress: told how much is done, 0 to 1.
    """
    index, block = weights.index, QuantizedBlock()
    count = len(plan.groups(index))
    folding = {group.name for group in plan.groups(index) if plan.layer(index, group).folds}
    several = bool(folding)  # then weights wait for the smoothing of what they feed

    def smoothed() -> Iterator[Smoothed]:
        for done, group in enumerate(plan.groups(index)):
            layer = plan.layer(index, group)
            problem = _problem(plan, group, weights, observations, hooks)
            solution = _floored(plan, group, observations, problem, layer)
            own = layer.storage.target is SmoothingTarget.MUL_SCALE
            if own and solution.smooth is not None:
                solution = replace(solution, smooth=stable_smooth(solution.smooth, plan.dtype))
            if group.name in folding and solution.smooth is not None:
                smooth = _fold(plan, group, weights, block.floats, solution.smooth)
                solution = replace(solution, smooth=smooth)
            yield Smoothed(group, problem, solution)
            if several:
                progress((done + 1) / count / 2)

    # Without folding one group's weights after the other are in memory.
    pending = list(smoothed()) if several else smoothed()
    divisors = _divisors(pending, folding) if isinstance(pending, list) else {}
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
        weights.drop(group.members)
        progress((done + 1) / count if not several else (1 + (done + 1) / count) / 2)
    if observations is not None:
        for path, absmax in (observations.cache or {}).items():
            name = f"{block_prefix(index)}{path}: cached output"
            absmax = absmax / divisors.get(path, 1)
            block.cache[path] = kv_cache.channel_scale(absmax, plan.dtype, name)
        block.ranges = observations.ranges.facts(observations.divided)
    return block


def _floored(
    plan: Plan,
    group: LinearGroup,
    observations: Observations | None,
    problem: Problem,
    layer: LayerPlan,
) -> Solution:
    """The smoothing of a group, nowhere so small that what it divides leaves float16."""
    solution = layer.algorithms.first(problem)
    inside = layer.storage.target is SmoothingTarget.INPUT_SCALE
    narrow = plan.dtype.name == "float16"
    if solution.smooth is None or observations is None or not narrow or inside:
        return solution
    floor = observations.ranges.floor(plan.config, group)
    return replace(solution, smooth=np.maximum(solution.smooth, floor))


def _problem(
    plan: Plan,
    group: LinearGroup,
    weights: Weights,
    observations: Observations | None,
    hooks: BlockHooks,
) -> Problem:
    index = weights.index
    prefix, layer = block_prefix(index), plan.layer(index, group)
    stats = None if observations is None else observations.stats[group.name]
    errors: tuple[Loss, Loss] = (_no_loss, _no_loss)
    if observations is not None:
        errors = weights.errors(group, observations.windows)
    found, biases = {}, {}
    for member in group.members:
        weight, bias = weights.get(f"{member}.weight"), weights.get(f"{member}.bias")
        assert weight is not None
        if hooks.transform:
            weight = hooks.transform(prefix + member, weight, stats)
        found[member] = weight
        if bias is not None:
            biases[member] = bias
    inside = layer.storage.target is not SmoothingTarget.NORM
    feed = None if inside else plan.feed(index, group)
    return Problem(
        name=f"{prefix}{group.fused}",
        scheme=layer.scheme,
        weights=found,
        biases=biases,
        stats=stats,
        dtype=plan.dtype,
        loss=errors[0],
        relative_mse=errors[1],
        smoothing=inside or feed is not None,
        shared=_shared(plan.config, group, feed),
        input_dtype=plan.dtype if _own_product(layer) else DTYPES["float32"],
        scale_type=layer.storage.scale_type,
    )


def _no_loss(candidate: Mapping[str, QuantizedLinear]) -> float:
    raise AssertionError("an algorithm without calibration asked for a loss")


def _own_product(layer: LayerPlan) -> bool:
    """Whether linears multiply their inputs by a vector, or scale long blocks of them."""
    own = layer.storage.target is SmoothingTarget.MUL_SCALE
    return own or isinstance(layer.scheme.activation, DualMxTokens)


def _shared(config: ModelConfig, group: LinearGroup, feed: str | None) -> tuple[int, int]:
    """Which inputs must share their smoothing: query heads that read the same value head."""
    if feed is None or feed != group.feed or not group.by_head:
        return 1, 1
    return config.num_heads // config.num_kv_heads, config.head_dim


def _fold(
    plan: Plan,
    group: LinearGroup,
    weights: Weights,
    floats: dict[str, np.ndarray],
    smooth: np.ndarray,
) -> np.ndarray:
    """Divides what feeds a group by its smoothing vector.

    A norm's gain is divided here, and the vector redefined by what is stored of it; the rows of a
    linear are divided when it is rounded.

    Returns:
        float32 (in,), what the weights' columns are multiplied by.
    """
    if not group.feeds_from_norm:
        return smooth
    name = f"{group.feed}.weight"
    gain = weights.get(name)
    assert gain is not None
    with np.errstate(over="ignore"):
        stored = (gain / smooth).astype(plan.dtype).astype(np.float32)
        plain = gain.astype(plan.dtype).astype(np.float32)  # where nothing can fold
    stored = np.where((stored != 0) & np.isfinite(stored), stored, plain)
    live = (stored != 0) & np.isfinite(stored)
    floats[name] = np.where(live, stored, gain)
    return np.where(live, gain / np.where(live, stored, 1), np.float32(1)).astype(np.float32)


def _divisors(consumers: Iterable[Smoothed], folding: Container[str]) -> dict[str, np.ndarray]:
    """Path of a linear to float32 (out,), the smoothing of what it feeds."""
    divisors = {}
    for group, problem, solution in consumers:
        if group.name not in folding or group.feeds_from_norm or solution.smooth is None:
            continue
        heads, size = problem.shared
        rows = solution.smooth
        if heads > 1:  # one value head's rows for the query heads that share them
            rows = rows.reshape(-1, heads, size)[:, 0].reshape(-1)
        divisors[group.feed] = rows
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
