"""The block-by-block driver: one float forward of each block serves every statistic.

In memory are one block's weights in float32, one batch of activations, the kept rows of each
linear's input, and the inputs and outputs of the tokens that searches look at. Hidden states are
on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from mindspore import Tensor

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
from ms_quant.cells.kv_cache import ObservedCache
from ms_quant.cells.quant_linear import QuantLinear
from ms_quant.cells.recorder import Recorder
from ms_quant.cells.tree import get_cell, replaced
from ms_quant.checkpoint.job import HiddenStates, JobDirectory, read_hidden
from ms_quant.checkpoint.reader import FloatTensors
from ms_quant.embedding import used_rows
from ms_quant.models.config import ModelConfig, block_prefix
from ms_quant.models.decoder import DecoderBlock, causal_mask, rope_tensors
from ms_quant.models.families import LinearGroup
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.observers import ActivationStats
from ms_quant.plan import Plan

EMBEDDING = "model.embed_tokens.weight"
SMALLEST = np.finfo(np.float64).tiny


class BlockRunner:
    """One decoder block whose weights are replaced block after block."""

    def __init__(self, config: ModelConfig, length: int):
        self.block = DecoderBlock(config)
        self.block.set_train(False)
        self.parameters = dict(self.block.parameters_and_names())
        self.cos, self.sin = rope_tensors(config, 0, length)
        self.mask = causal_mask(length)

    def load(self, checkpoint: FloatTensors, index: int) -> None:
        """Reads a block's tensors, one at a time."""
        for name, parameter in self.parameters.items():
            array = checkpoint.read_float32(f"{block_prefix(index)}{name}")
            parameter.set_data(Tensor.from_numpy(array))

    def array(self, name: str) -> np.ndarray | None:
        """A float32 parameter, or None when the block has none of that name."""
        return self.parameters[name].asnumpy() if name in self.parameters else None

    def attend(self, hidden: np.ndarray, cache: ObservedCache | None = None) -> np.ndarray:
        return self.block.attend(Tensor(hidden), self.cos, self.sin, self.mask, cache).asnumpy()

    def feed_forward(self, middle: np.ndarray) -> np.ndarray:
        return self.block.feed_forward(Tensor(middle)).asnumpy()


class SearchWindows:
    """Float activations of the windows that searches look at: before, within and after a block.

    Args:
        shape: (windows, tokens, hidden) of all there is.
        tokens: searches look at this many tokens at most, but at one window at least; the windows
            are spread evenly over all.
    """

    def __init__(self, shape: tuple[int, int, int], tokens: int):
        count, self.length, hidden = shape
        wanted = min(count, max(1, tokens // self.length))
        self.chosen = np.arange(wanted) * count // wanted
        self.states = np.empty((3, wanted, self.length, hidden), np.float32)

    def add(self, start: int, *states: np.ndarray) -> None:
        """Keeps what was chosen of a batch that begins with window ``start``."""
        first, last = np.searchsorted(self.chosen, [start, start + len(states[0])])
        for kept, state in zip(self.states, states, strict=True):
            kept[first:last] = state[self.chosen[first:last] - start]

    def batches(self) -> Iterator[np.ndarray]:
        """Inputs, middles and outputs, of some windows at a time."""
        step = max(1, BATCH_TOKENS // self.length)
        for start in range(0, len(self.chosen), step):
            yield self.states[:, start : start + step]


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
    runner = BlockRunner(plan.config, tokens.shape[1])
    first = job.finished_blocks()
    if first == 0:
        embed(checkpoint, tokens, job)
    for index in range(first, plan.config.num_layers):
        runner.load(checkpoint, index)
        cache = ObservedCache(block_prefix(index)) if plan.kv_cache else None
        plans = [plan for plan, _ in targets]
        observe = partial(_observe, plans, runner, job, index, tokens.shape, progress)
        stats, searched = observe(steps.rounding is not None, cache)
        seen = partial(_seen, runner, stats, searched)
        half = partial(_second_half, progress, index)
        cached = None if cache is None else cache.absmax
        make = partial(_make, index, runner, seen, steps, cached)
        norms = {f"{name}.l2_norm": stats[name].l2_norm for name in stats}
        finish_targets(targets, index, make, norms, half)


def _make(
    index: int,
    runner: BlockRunner,
    seen: Callable[[LinearGroup], Seen],
    steps: Steps,
    cached: Mapping[str, np.ndarray] | None,
    plan: Plan,
    progress: Callable[[float], None],
) -> Block:
    return quantize_block(plan, index, runner.array, seen, steps, progress, cached)


def _second_half(progress: Progress, index: int, part: float) -> None:
    progress(index, (1 + part) / 2)


def _seen(
    runner: BlockRunner,
    stats: Mapping[str, ActivationStats],
    searched: SearchWindows,
    group: LinearGroup,
) -> Seen:
    errors = partial(_token_errors, runner, group, searched)
    return Seen(stats[group.name], partial(_loss, errors), partial(_damage, errors))


def _observe(
    plans: Sequence[Plan],
    runner: BlockRunner,
    job: JobDirectory,
    index: int,
    shape: tuple[int, ...],
    progress: Progress,
    with_hessian: bool,
    cache: ObservedCache | None,
) -> tuple[dict[str, ActivationStats], SearchWindows]:
    """The float forward of a block: statistics, and the searched windows' inputs and outputs."""
    plan, (sequences, length) = plans[0], shape
    batch = max(1, BATCH_TOKENS // length)
    stats, recorders = {}, {}
    wanted = {group.name for plan in plans for group in plan.groups(index)}
    for group in plan.config.family.groups:
        if group.name not in wanted:
            continue
        path = group.members[0]
        cell = get_cell(runner.block, path)
        chains = [plan.of(index, group).chain for plan in plans]
        stats[group.name] = ActivationStats(
            cell.in_channels,
            sequences * length,
            max(chain.kept_tokens for chain in chains),
            f"{block_prefix(index)}{path}: calibration input",
            with_hessian or any(chain.any("hessian") for chain in chains),
            any(chain.any("histogram") for chain in chains),
        )
        recorders[path] = Recorder(cell, stats[group.name].update)
    last = index + 1 == plan.config.num_layers
    hidden_shape = (sequences, length, plan.config.hidden_size)
    following = None if last else HiddenStates(job.hidden_file(index + 1), hidden_shape)
    searched = SearchWindows(hidden_shape, plan.search_tokens)
    with replaced(runner.block, recorders):
        for start in range(0, sequences, batch):
            hidden = read_hidden(job.hidden_file(index), start, start + batch)
            middle = runner.attend(hidden, cache)
            output = runner.feed_forward(middle)
            searched.add(start, hidden, middle, output)
            if following:
                following.append(output)
            progress(index, min(1.0, (start + batch) / sequences) / 2)
    if following:
        following.commit()
    return stats, searched


Candidate = Mapping[str, QuantizedLinear]
Errors = Callable[[Candidate], Iterator[tuple[np.ndarray, np.ndarray]]]


def _token_errors(
    runner: BlockRunner, group: LinearGroup, searched: SearchWindows, candidate: Candidate
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What a candidate in place of a float group changes in the block's output, and that output."""
    cells = {path: QuantLinear(linear) for path, linear in candidate.items()}
    with replaced(runner.block, cells):
        for hidden, middle, exact in searched.batches():
            found = runner.feed_forward(middle if group.in_mlp else runner.attend(hidden))
            yield found - exact, exact


def _loss(errors: Errors, candidate: Candidate) -> float:
    """Mean squared error of the block's output."""
    squares = [(np.square(e).sum(dtype=np.float64), e.size) for e, _ in errors(candidate)]
    return float(sum(square for square, _ in squares) / sum(size for _, size in squares))


def _damage(errors: Errors, candidate: Candidate) -> float:
    """Squared error over squared output of a token, in the mean over tokens.

    Some tokens have a few activations that are larger than all others together. In a mean of
    squares over tokens they alone would count.
    """
    shares = [_power(e) / np.maximum(_power(y), SMALLEST) for e, y in errors(candidate)]
    return float(np.concatenate([share.reshape(-1) for share in shares]).mean())


def _power(x: np.ndarray) -> np.ndarray:
    """Squared length of each token, float64."""
    return np.square(x, dtype=np.float64).sum(axis=-1)
