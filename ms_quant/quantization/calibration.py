"""The block-by-block driver: one float forward of each block serves every statistic.

In memory are one block's weights in float32, one batch of activations, the kept rows of each
linear's input, and the inputs and outputs of the tokens that searches look at. Hidden states are
on disk.

Of a model that will run in float16 a block whose activations do not fit that is refused here, or
made to fit by dividing what a linear makes and multiplying what reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ms_quant.budget import BATCH_TOKENS
from ms_quant.files.reader import FloatTensors
from ms_quant.job.directory import HiddenStates, JobDirectory, read_hidden
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.embedding import used_rows
from ms_quant.models.linear_forward import Linear
from ms_quant.models.names import GroupId, block_prefix
from ms_quant.plan.plan import Plan
from ms_quant.quantization.block import (
    NO_HOOKS,
    Block,
    BlockHooks,
    Progress,
    Seen,
    Target,
    finish_targets,
    quantize_block,
)
from ms_quant.quantization.divided import factors
from ms_quant.statistics import activation_range as places
from ms_quant.statistics.activation_range import BlockRanges, Divided
from ms_quant.statistics.observers import ActivationStats, CacheRange
from ms_quant.statistics.search_windows import BlockErrors, SearchWindows

EMBEDDING = "model.embed_tokens.weight"


def embed(checkpoint: FloatTensors, tokens: np.ndarray, job: JobDirectory) -> None:
    """Writes the first hidden states."""
    rows = used_rows(checkpoint.float32_chunks(EMBEDDING), tokens)
    width = checkpoint.info(EMBEDDING).shape[1]
    hidden = HiddenStates(job.hidden_file(0), (*tokens.shape, width))
    for sequence in tokens:
        hidden.append(rows(sequence))
    hidden.commit()


def calibrate(
    targets: Sequence[Target],
    checkpoint: FloatTensors,
    tokens: np.ndarray,
    progress: Progress,
    hooks: BlockHooks = NO_HOOKS,
) -> None:
    """Quantizes every unfinished block of a job.

    Args:
        targets: what to do, for each format, and where finished blocks and hidden states are.
        checkpoint: the float model.
        tokens: int32 (sequences, tokens) calibration data.
        progress: told how far each block is.
        hooks: what is done around the algorithm.

    Raises:
        MsQuantError: a weight or an activation is NaN or inf, or the disk is full.
    """
    plan, job = targets[0]
    first = job.finished_blocks()
    if first == 0:
        embed(checkpoint, tokens, job)
    at = Positions(plan.config, tokens.shape[1])
    for index in range(first, plan.config.num_layers):
        _calibrate_block(targets, checkpoint, index, at, tokens.shape, progress, hooks)


def _calibrate_block(
    targets: Sequence[Target],
    checkpoint: FloatTensors,
    index: int,
    at: Positions,
    shape: tuple[int, ...],
    progress: Progress,
    hooks: BlockHooks,
) -> None:
    (plan, job), prefix = targets[0], block_prefix(index)
    cached = plan.config.block(index).cached
    block = BlockForward.load(plan.config, index, checkpoint.read_float32)
    cache = CacheRange(prefix, cached) if plan.kv_cache else None
    plans = [plan for plan, _ in targets]
    observe = partial(_observe, plans, block, at, job, shape, progress, hooks)
    observed, divided = observe(cache), Divided()
    if plan.dtype.name == "float16":
        divided = observed.ranges.divisions(plan.config)
        if divided:
            _divide(block, divided)
            cache = CacheRange(prefix, cached) if plan.kv_cache else None
            observed = observe(cache)
        observed.ranges.check_float16()
    seen = partial(_seen, plan, block, at, observed)
    half = partial(_second_half, progress, index)
    largest = None if cache is None else cache.absmax
    make = partial(_make, block, seen, hooks, largest, observed.ranges.facts(divided))
    norms = {f"{name}.l2_norm": stats.l2_norm for name, stats in observed.stats.items()}
    finish_targets(targets, index, make, norms, half)


class _Observed(NamedTuple):
    """What the float forward of a block has shown.

    Attributes:
        stats: of the input of each group.
        searched: inputs and outputs of the windows that searches look at.
        ranges: how large every place gets.
    """

    stats: dict[str, ActivationStats]
    searched: SearchWindows
    ranges: BlockRanges


def _divide(block: BlockForward, divided: Divided) -> None:
    """Changes a loaded block so that it computes the same with smaller activations."""
    for name, array in block.arrays.items():
        rows, columns = factors(block.spec, divided, name)
        if rows is not None:
            array *= rows if array.ndim == 1 else rows[:, None]
        if columns is not None:
            array *= columns


def _make(
    block: BlockForward,
    seen: Callable[[LinearGroup], Seen],
    hooks: BlockHooks,
    cached: Mapping[str, np.ndarray] | None,
    ranges: Mapping[str, Any],
    plan: Plan,
    progress: Callable[[float], None],
) -> Block:
    made = quantize_block(plan, block.index, block.arrays.get, seen, hooks, progress, cached)
    made.ranges = dict(ranges)
    return made


def _second_half(progress: Progress, index: int, part: float) -> None:
    progress(index, (1 + part) / 2)


def _seen(
    plan: Plan, block: BlockForward, at: Positions, observed: _Observed, group: LinearGroup
) -> Seen:
    errors = BlockErrors(block, at, group, observed.searched)
    narrow = plan.dtype.name == "float16"
    floor = observed.ranges.floor(block.spec, group) if narrow else None
    return Seen(observed.stats[group.name], errors.loss, errors.relative_mse, floor)


def _observe(
    plans: Sequence[Plan],
    block: BlockForward,
    at: Positions,
    job: JobDirectory,
    shape: tuple[int, ...],
    progress: Progress,
    hooks: BlockHooks,
    cache: CacheRange | None,
) -> _Observed:
    """The float forward of a block."""
    plan, index, (sequences, length) = plans[0], block.index, shape
    spec = plan.config.block(index)
    batch = max(1, BATCH_TOKENS // length)
    stats: dict[str, ActivationStats] = {}
    ranges = BlockRanges(index)
    watched = {
        path: _watched(linear, partial(ranges.add, places.output_of(path)))
        for path, linear in block.linears.items()
    }
    wanted = {group.name for plan in plans for group in plan.groups(index)}
    for group in spec.groups:
        path = group.members[0]
        watched[path] = _shown(watched[path], partial(ranges.add, places.input_of(group)))
        if group.name not in wanted:
            continue
        layers = [plan.layers[GroupId(index, group.name)] for plan in plans]
        chains = [layer.algorithms for layer in layers if layer is not None]
        stats[group.name] = ActivationStats(
            group.in_features,
            sequences * length,
            max(algorithms.kept_tokens for algorithms in chains),
            f"{block_prefix(index)}{path}: calibration input",
            hooks.rounding is not None or any(algorithms.any("hessian") for algorithms in chains),
            any(algorithms.any("histogram") for algorithms in chains),
        )
        watched[path] = _shown(watched[path], stats[group.name].update)
    states, last = list[np.ndarray](), index + 1 == plan.config.num_layers
    ranged = spec.hidden if index == 0 else spec.hidden[1:]  # the first is the last block's output
    taps = {place: [states.append] for place in spec.hidden}
    for place in ranged:
        taps[place].append(partial(ranges.add, place))
    shown = block.with_linears(watched).with_taps(taps)
    hidden_shape = (sequences, length, plan.config.hidden_size)
    following = None if last else HiddenStates(job.hidden_file(index + 1), hidden_shape)
    searches = hooks.rounding is not None or any(plan.any("searches") for plan in plans)
    searched = SearchWindows(hidden_shape, len(spec.hidden), plan.search_tokens if searches else 0)
    for start in range(0, sequences, batch):
        hidden = read_hidden(job.hidden_file(index), start, start + batch)
        states.clear()
        output = shown.run(hidden, at, cache)
        searched.add(start, *states)
        if following:
            following.append(output)
        progress(index, min(1.0, (start + batch) / sequences) / 2)
    if following:
        following.commit()
    return _Observed(stats, searched, ranges)


def _watched(linear: Linear, observe: Callable[[np.ndarray], None]) -> Linear:
    """A linear that shows its output."""

    def watched(rows: np.ndarray) -> np.ndarray:
        made = linear(rows)
        observe(made)
        return made

    return watched


def _shown(linear: Linear, observe: Callable[[np.ndarray], None]) -> Linear:
    """A linear that shows its input first."""

    def shown(rows: np.ndarray) -> np.ndarray:
        observe(rows)
        return linear(rows)

    return shown
