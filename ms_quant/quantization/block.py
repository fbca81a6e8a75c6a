"""Quantizing the linears of one block: a pure function of plan, weights and observations.

First every group's smoothing is decided, on the float weights. Where it has no place in the
group's own tensors it is folded into what comes before: into a norm's gain, or into the rows of
the linear whose output it divides. Then the weights, so changed, are rounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ms_quant.algorithms.problem import InputMaxima, apply
from ms_quant.models.block_spec import LinearGroup
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.plan.plan import Plan
from ms_quant.progress import PartProgress, silent
from ms_quant.quantization.cache_scales import cache_scales
from ms_quant.quantization.hooks import NO_HOOKS, BlockHooks
from ms_quant.quantization.input_facts import input_facts
from ms_quant.quantization.output_error import output_error
from ms_quant.quantization.smoothing import BlockSmoothing, Smoothed
from ms_quant.quantization.streamed import is_streamed, quantize_streamed
from ms_quant.quantization.weights import StoredWeights, Weights
from ms_quant.statistics.observations import Observations


@dataclass
class QuantizedBlock:
    """A quantized block.

    Attributes:
        linears: path to quantized linear.
        floats: float32 tensors that folding has changed, by name.
        notes: group to what was chosen.
        cache: path to float32 scales of what is in int8 with a cache.
        ranges: how large activations get, see :mod:`ms_quant.statistics.activation_range`.
        seconds: group to what its smoothing and rounding took. Smoothing that groups share counts
            for the first of them.
        errors: group to the relative error of its outputs on calibration tokens, see
            :func:`~ms_quant.quantization.output_error.output_error`; none without calibration.
        routing: how many tokens came to its experts; empty where it has none.
        inputs: group to how large its input is, see
            :func:`~ms_quant.quantization.input_facts.input_facts`.
    """

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    floats: dict[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    cache: dict[str, np.ndarray] = field(default_factory=dict)
    ranges: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    routing: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)


def quantize(
    plan: Plan,
    weights: Weights,
    observations: Observations | None,
    hooks: BlockHooks = NO_HOOKS,
    progress: PartProgress = silent,
    *,
    alone: bool = False,
    only: Collection[str] | None = None,
    maxima: Callable[[], InputMaxima] | None = None,
) -> QuantizedBlock:
    """The quantized linears of one block, and what the algorithms chose.

    Args:
        plan: what to do.
        weights: the block's float parameters.
        observations: what calibration has seen of it; None without calibration.
        hooks: what is done around the algorithms.
        progress: told how much is done, 0 to 1.
        alone: each group is for a float block: nothing is folded into what makes its input, and
            its linears smooth it themselves.
        only: names of the groups that are quantized, with all that they share smoothing with,
            unless that is what experts read; None for all.
        maxima: gives what is known of the input of all experts, where some of them are left out.
    """
    index = weights.index
    smoothing = BlockSmoothing(plan, weights, observations, hooks, only, maxima)
    rows = (is_streamed(plan.layer(index, group)) for group in smoothing.wanted)
    if isinstance(weights, StoredWeights) and weights.by_rows and hooks == NO_HOOKS and all(rows):
        return _streamed(plan, weights, smoothing.wanted, progress)
    block, count = QuantizedBlock(floats=smoothing.floats), len(smoothing.wanted)
    several = bool(smoothing.folded)  # then weights wait for the smoothing of what they feed
    pending: Iterable[Smoothed] = _timed(smoothing.groups(), block.seconds)
    divisors: dict[str, np.ndarray] = {}
    if several:
        pending = _all(pending, lambda done: progress(done / count / 2))
        divisors = {} if alone else smoothing.divisors(pending)
    for done, (group, problem, solution) in enumerate(pending):
        started = time.perf_counter()
        problem = smoothing.with_scaled_rows(problem, divisors)
        if hooks.rounding is None:
            solution = plan.layer(index, group).algorithms.rest(problem, solution)
            linears, note = apply(problem, solution), dict(solution.note)
        else:
            linears, note = hooks.rounding(problem, solution)
            note = {**solution.note, **note}
        error = output_error(problem, linears)
        if error is not None:
            block.errors[group.name] = error
        if found := input_facts(problem, solution):
            block.inputs[group.name] = found
        if group.name in smoothing.folded and not alone:
            linears = {path: replace(linear, smooth=None) for path, linear in linears.items()}
        block.linears.update(linears)
        block.notes[group.name] = note
        weights.drop(group.members)
        block.seconds[group.name] += time.perf_counter() - started
        progress((done + 1) / count if not several else (1 + (done + 1) / count) / 2)
    if observations is not None:
        if observations.cache:
            spec, dtype = plan.config.block(index), plan.dtype
            block.cache = cache_scales(spec, plan.kv_cache, dtype, observations.cache, divisors)
        block.ranges = observations.ranges.facts(observations.divided)
    return block


def _streamed(
    plan: Plan, weights: StoredWeights, groups: Sequence[LinearGroup], progress: PartProgress
) -> QuantizedBlock:
    block = QuantizedBlock()
    for done, group in enumerate(groups, 1):
        started = time.perf_counter()
        block.linears |= quantize_streamed(plan, weights, group)
        block.notes[group.name] = {}
        block.seconds[group.name] = time.perf_counter() - started
        progress(done / len(groups))
    return block


def _timed(groups: Iterable[Smoothed], seconds: dict[str, float]) -> Iterator[Smoothed]:
    """The groups; notes what it took to decide the smoothing of each."""
    started = time.perf_counter()
    for smoothed in groups:
        seconds[smoothed.group.name] = time.perf_counter() - started
        yield smoothed
        started = time.perf_counter()


def _all(groups: Iterable[Smoothed], progress: Callable[[int], None]) -> list[Smoothed]:
    found = []
    for group in groups:
        found.append(group)
        progress(len(found))
    return found
