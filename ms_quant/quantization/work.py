"""The work of a job, block by block: observing and quantizing, in any order.

In memory are one block's weights in float32, one batch of activations, the kept rows of each
linear's input, and the inputs and outputs of the tokens that searches look at. Hidden states are
on disk, and stay there until both the next hidden states and the block are.

Of a model that will run in float16 a block whose activations do not fit that is refused here, or
made to fit by dividing what a linear makes and multiplying what reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from ms_quant.budget import BUDGET, Budget
from ms_quant.files.reader import FloatTensors
from ms_quant.job.directory import JobDirectory
from ms_quant.job.states import HiddenStates, StoredStates
from ms_quant.models.block_forward import BlockForward, Observer, Positions
from ms_quant.models.embedding import used_rows
from ms_quant.models.experts import Experts
from ms_quant.models.further_tokens import EMBEDDING as FURTHER_EMBEDDING
from ms_quant.models.further_tokens import FurtherInput
from ms_quant.models.names import block_prefix
from ms_quant.plan.plan import Plan
from ms_quant.progress import BlockDone, BlockProgress, silent
from ms_quant.quantization.block import QuantizedBlock, quantize
from ms_quant.quantization.hooks import NO_HOOKS, BlockHooks
from ms_quant.quantization.observe import Wanted, divide, observe, wanted
from ms_quant.quantization.routed import RoutedBlock, finish_stored, part_groups
from ms_quant.quantization.weights import LoadedWeights, StoredWeights, Weights
from ms_quant.statistics.activation_range import BlockRanges, Divided
from ms_quant.statistics.observations import Observations

EMBEDDING = "model.embed_tokens.weight"

Target = tuple[Plan, JobDirectory]
"""A plan for one format, and the job as it has that format's blocks."""


class BlockWork:
    """What is to be done to the blocks of a job.

    Args:
        targets: what to do, for each format, and where finished blocks and hidden states are.
        checkpoint: the float model.
        tokens: int32 (windows, tokens) calibration data; None where nothing is calibrated.
        progress: told how far each block is.
        hooks: what is done around the algorithms.
        budget: what bounds its memory.
        all_tokens: every expert is seen on all tokens, not on those alone that go to it.
        done: told of each block that is finished, with the first format's errors.

    Attributes:
        targets, checkpoint, tokens, progress, hooks, budget, all_tokens, done: as given.
        config: the model's shape.
        job: the job as it has the first format's blocks.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        checkpoint: FloatTensors,
        tokens: np.ndarray | None,
        progress: BlockProgress,
        hooks: BlockHooks = NO_HOOKS,
        budget: Budget = BUDGET,
        *,
        all_tokens: bool = False,
        done: BlockDone = silent,
    ):
        self.targets, self.checkpoint, self.tokens = targets, checkpoint, tokens
        self.progress, self.hooks, self.budget = progress, hooks, budget
        self.all_tokens, self.done = all_tokens, done
        self.config, self.job = targets[0][0].config, targets[0][1]
        self._at: dict[int, Positions] = {}
        self._loaded: tuple[BlockForward, Divided] | None = None

    def unfinished(self) -> list[int]:
        """The blocks that are left."""
        done = self.job.finished()
        return [index for index in range(self.config.num_blocks) if index not in done]

    def observe(self, index: int) -> Observations | None:
        """Runs a block on the calibration data; without any there is nothing to see.

        Raises:
            MsQuantError: a weight or an activation is NaN or infinite, an activation does not fit
                float16, or the disk is full.
        """
        if self.tokens is None or index > self.config.num_layers:
            return None  # no block is run that reads what a block for further tokens makes
        if index == self.config.num_layers and not self.targets[0][0].groups(index):
            return None
        self._make_hidden(index)
        if self.by_experts(index):
            return RoutedBlock(self, index).observe()
        block, at = self.block(index, {}), self.at(index)
        following = self.following(index)
        see = partial(observe, block, at, wanted=self.wanted(index), shape=self.shape(index))
        seen = see(
            hidden=self.hidden(index),
            following=following.append if following else _drop,
            inputs=self.watchers(index),
        )
        if following:
            following.commit()  # dividing changes no output
        if self.narrow:
            divided = seen.ranges.divisions(self.config)
            if divided:
                divide(block, divided)
                self._loaded = block, divided
                seen = see(hidden=self.hidden(index))
                seen.divided = divided
            seen.ranges.check_float16()
        return seen

    def by_experts(self, index: int) -> bool:
        """Whether a block has experts, which are done one after the other."""
        return isinstance(self.config.block(index).branches[-1], Experts)

    def wanted(self, index: int) -> Wanted:
        """What must be kept of a block."""
        return wanted([plan for plan, _ in self.targets], index, self.hooks)

    def watchers(self, index: int) -> Mapping[str, Observer]:
        """Who else is shown the inputs of a block's groups, by name."""
        return {}

    def finish(self, index: int, observations: Observations | None) -> None:
        """Quantizes a block for each format from the same observations, and commits it.

        The first format's block is committed last: it says that all are there.
        """
        half, norms = observations is not None, self.norms(observations)
        only, routed = None, None
        if self.by_experts(index):
            only = part_groups(self, index, None)
            if observations is None:
                finish_stored(self, index)
            else:
                routed = RoutedBlock(self, index)
        done: list[tuple[Plan, QuantizedBlock]] = []
        for count, (plan, job) in enumerate(reversed(self.targets)):
            block = next((block for other, block in done if plan.same_numbers(other)), None)
            if block is None:
                part = partial(self._progress, index, count, half)
                weights = self._weights(index, observations)
                block = quantize(
                    plan,
                    weights,
                    observations,
                    self.hooks,
                    part,
                    only=only,
                    maxima=routed.maxima if routed else None,
                )
                if observations is None and self.tokens is not None:
                    block.ranges = BlockRanges(index).facts({})  # a block that no token passes
                block.routing = routed.facts() if routed else {}
                done.append((plan, block))
            job.finish_block(index, block, norms if job.target == 0 else {})
        self._loaded = None
        self._drop_hidden()
        if routed is not None:
            routed.drop()
        self.done(index, self.job.errors(index))

    @staticmethod
    def norms(observations: Observations | None) -> dict[str, np.ndarray]:
        """The statistics of groups that a finished block keeps."""
        stats = {} if observations is None else observations.stats
        return {f"{name}.l2_norm": one.l2_norm for name, one in stats.items()}

    @property
    def narrow(self) -> bool:
        """Whether activations have to fit float16."""
        return self.targets[0][0].dtype.name == "float16"

    @staticmethod
    def prefix(index: int) -> str:
        """What the names of all tensors of a block begin with."""
        return block_prefix(index)

    def _progress(self, index: int, count: int, half: bool, part: float) -> None:
        part = (count + part) / len(self.targets)
        self.progress(index, (1 + part) / 2 if half else part)

    def shape(self, index: int) -> tuple[int, int, int]:
        """(windows, tokens, hidden) of a block's calibration data. After the last token of a window
        none is known, which a block for further tokens would read."""
        assert self.tokens is not None
        windows, length = self.tokens.shape
        return windows, length - (index >= self.config.num_layers), self.config.hidden_size

    def _weights(self, index: int, observations: Observations | None) -> Weights:
        if observations is None:
            return StoredWeights(self.checkpoint, index)
        block, searches = self.block(index, observations.divided), observations.windows.tokens
        return LoadedWeights(block, self.at(index), release=len(self.targets) == 1 and not searches)

    def block(self, index: int, divided: Divided) -> BlockForward:
        """A float block with some rows divided; the last one stays in memory. Its experts are
        read when they are called, where they are done one after the other."""
        if self._loaded is not None:
            block, found = self._loaded
            if block.index == index and found.keys() == divided.keys():
                return block
        self._loaded = None
        read = self.checkpoint.read_float32
        experts = None if not self.by_experts(index) else False
        block = BlockForward.load(self.config, index, read, budget=self.budget, experts=experts)
        divide(block, divided)
        self._loaded = block, divided
        return block

    def at(self, index: int) -> Positions:
        """The positions of a window's tokens in a block."""
        length = self.shape(index)[1]
        if length not in self._at:
            self._at[length] = Positions(self.config, length)
        return self._at[length]

    def hidden(self, index: int, share: float = 0.5) -> Iterator[np.ndarray]:
        """The inputs of a block, some windows at a time; the last is told as a share done."""
        windows, length, _ = self.shape(index)
        states = StoredStates(self.job.hidden_file(index), self.shape(max(0, index - 1)))
        batch = self.budget.windows(length)
        made = self._further_input() if index == self.config.num_layers else None
        for start in range(0, windows, batch):
            rows = states[start : start + batch]
            yield rows if made is None else made(start, rows)
            self.progress(index, share * min(1.0, (start + batch) / windows))

    def _further_input(self) -> Callable[[int, np.ndarray], np.ndarray]:
        """What the block for further tokens reads, from what the last block gave to windows."""
        assert self.tokens is not None
        tokens, last = self.tokens[:, 1:], self.config.num_layers
        name = f"{block_prefix(last)}{FURTHER_EMBEDDING}.weight"
        rows = used_rows(self.checkpoint.float32_chunks(name), tokens)
        made = FurtherInput(self.config, self.checkpoint.read_float32)
        return lambda start, x: made(x[:, :-1], rows(tokens[start : start + len(x)]))

    def _has_hidden(self, index: int) -> bool:
        return self.job.hidden_file(index).exists()

    def following(self, index: int) -> HiddenStates | None:
        """Where a block's outputs go; None where no unfinished block begins with them."""
        later = next((other for other in self.unfinished() if other > index), None)
        if later is None or any(self._has_hidden(j) for j in range(index + 1, later + 1)):
            return None
        return HiddenStates(self.job.hidden_file(index + 1), self.shape(index))

    def _make_hidden(self, index: int) -> None:
        """The inputs of a block, from the nearest that there are before it."""
        first = next((j for j in range(index, -1, -1) if self._has_hidden(j)), None)
        if first is None:
            self._embed()
            first = 0
        for earlier in range(first, index):
            block, at = self.block(earlier, {}), self.at(earlier)
            outputs = HiddenStates(self.job.hidden_file(earlier + 1), self.shape(earlier))
            for batch in self.hidden(earlier):
                outputs.append(block(batch, at))
            outputs.commit()

    def _embed(self) -> None:
        """Writes the first hidden states."""
        assert self.tokens is not None
        rows = used_rows(self.checkpoint.float32_chunks(EMBEDDING), self.tokens)
        hidden = HiddenStates(self.job.hidden_file(0), self.shape(0))
        for window in self.tokens:
            hidden.append(rows(window))
        hidden.commit()

    def _drop_hidden(self) -> None:
        """Deletes the hidden states that no unfinished block begins with."""
        there = [index for index in range(self.config.num_blocks) if self._has_hidden(index)]
        needed = {
            max((index for index in there if index <= block), default=None)
            for block in self.unfinished()
        }
        for index in there:
            if index not in needed:
                self.job.hidden_file(index).unlink()


def _drop(output: np.ndarray) -> None:
    """No block begins with it."""
