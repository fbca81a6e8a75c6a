"""The block-by-block driver: one float forward of each block serves every statistic.

In memory are one block's weights in float32, one batch of activations, the kept rows of each
linear's input, and the inputs and outputs of the tokens that searches look at. Hidden states are
on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from ms_quant.blocks import (
    PLAIN,
    Block,
    Progress,
    Seen,
    Steps,
    Target,
    finish_targets,
    quantize_block,
)
from ms_quant.budget import BATCH_TOKENS
from ms_quant.checkpoint.job import HiddenStates, JobDirectory, read_hidden
from ms_quant.checkpoint.reader import FloatTensors
from ms_quant.embedding import used_rows
from ms_quant.models.config import block_prefix
from ms_quant.models.families import LinearGroup
from ms_quant.models.host_block import HostBlock, Linear
from ms_quant.observers import ActivationStats, CacheRange
from ms_quant.plan import Plan
from ms_quant.searched import BlockErrors, SearchWindows

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
    steps: Steps = PLAIN,
) -> None:
    """Quantizes every unfinished block of a job.

    Args:
        targets: what to do, for each format, and where finished blocks and hidden states are.
        checkpoint: the float model.
        tokens: int32 (sequences, tokens) calibration data.
        progress: told how far each block is.
        steps: what is done around the algorithm.

    Raises:
        MsQuantError: a weight or an activation is NaN or inf, or the disk is full.
    """
    plan, job = targets[0]
    block = HostBlock(plan.config, tokens.shape[1])
    first = job.finished_blocks()
    if first == 0:
        embed(checkpoint, tokens, job)
    for index in range(first, plan.config.num_layers):
        prefix = block_prefix(index)
        block.load(checkpoint.read_float32, prefix)
        cache = CacheRange(prefix) if plan.kv_cache else None
        plans = [plan for plan, _ in targets]
        stats, searched = _observe(plans, block, job, index, tokens.shape, progress, steps, cache)
        seen = partial(_seen, block, stats, searched)
        half = partial(_second_half, progress, index)
        cached = None if cache is None else cache.absmax
        make = partial(_make, index, block, seen, steps, cached)
        norms = {f"{name}.l2_norm": stats[name].l2_norm for name in stats}
        finish_targets(targets, index, make, norms, half)


def _make(
    index: int,
    block: HostBlock,
    seen: Callable[[LinearGroup], Seen],
    steps: Steps,
    cached: Mapping[str, np.ndarray] | None,
    plan: Plan,
    progress: Callable[[float], None],
) -> Block:
    return quantize_block(plan, index, block.arrays.get, seen, steps, progress, cached)


def _second_half(progress: Progress, index: int, part: float) -> None:
    progress(index, (1 + part) / 2)


def _seen(
    block: HostBlock,
    stats: Mapping[str, ActivationStats],
    searched: SearchWindows,
    group: LinearGroup,
) -> Seen:
    errors = BlockErrors(block, group, searched)
    return Seen(stats[group.name], errors.loss, errors.damage)


def _observe(
    plans: Sequence[Plan],
    block: HostBlock,
    job: JobDirectory,
    index: int,
    shape: tuple[int, ...],
    progress: Progress,
    steps: Steps,
    cache: CacheRange | None,
) -> tuple[dict[str, ActivationStats], SearchWindows]:
    """The float forward of a block: statistics, and the searched windows' inputs and outputs."""
    plan, (sequences, length) = plans[0], shape
    batch = max(1, BATCH_TOKENS // length)
    stats: dict[str, ActivationStats] = {}
    watched: dict[str, Linear] = {}
    wanted = {group.name for plan in plans for group in plan.groups(index)}
    for group in plan.config.family.groups:
        if group.name not in wanted:
            continue
        path = group.members[0]
        chains = [plan.of(index, group).chain for plan in plans]
        stats[group.name] = ActivationStats(
            plan.config.linear_shapes()[path][1],
            sequences * length,
            max(chain.kept_tokens for chain in chains),
            f"{block_prefix(index)}{path}: calibration input",
            steps.rounding is not None or any(chain.any("hessian") for chain in chains),
            any(chain.any("histogram") for chain in chains),
        )
        watched[path] = _watched(block, path, stats[group.name].update)
    last = index + 1 == plan.config.num_layers
    hidden_shape = (sequences, length, plan.config.hidden_size)
    following = None if last else HiddenStates(job.hidden_file(index + 1), hidden_shape)
    searches = steps.rounding is not None or any(plan.any("searches") for plan in plans)
    searched = SearchWindows(hidden_shape, plan.search_tokens if searches else 0)
    for start in range(0, sequences, batch):
        hidden = read_hidden(job.hidden_file(index), start, start + batch)
        middle = block.attend(hidden, watched, cache)
        output = block.feed_forward(middle, watched)
        searched.add(start, hidden, middle, output)
        if following:
            following.append(output)
        progress(index, min(1.0, (start + batch) / sequences) / 2)
    if following:
        following.commit()
    return stats, searched


def _watched(block: HostBlock, path: str, observe: Callable[[np.ndarray], None]) -> Linear:
    """A float linear that shows its input first."""

    def linear(rows: np.ndarray) -> np.ndarray:
        observe(rows)
        return block.linear(path, rows)

    return linear
