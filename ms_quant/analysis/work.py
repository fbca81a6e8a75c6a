"""The work of an analysis, block by block: as quantizing, but errors are kept instead of codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ms_quant import kernels
from ms_quant.analysis.divergence import divergences
from ms_quant.analysis.inputs import InputWatch
from ms_quant.analysis.measure import FloatBlock, phases
from ms_quant.analysis.probe import Probe
from ms_quant.evaluation.head import EMBEDDING, head_name
from ms_quant.files.reader import FloatTensors
from ms_quant.job.directory import JobDirectory
from ms_quant.job.states import HiddenStates, StoredStates
from ms_quant.models.block_forward import Observer, Positions
from ms_quant.models.block_spec import BlockSpec
from ms_quant.models.cache import Int8KeyValueCache, KeyValueCache, static_cache
from ms_quant.models.embedding import used_rows
from ms_quant.plan.plan import Plan
from ms_quant.progress import BlockProgress
from ms_quant.quantization.block import QuantizedBlock, quantize
from ms_quant.quantization.cache_scales import cache_scales
from ms_quant.quantization.observe import GroupWanted, Wanted
from ms_quant.quantization.weights import LoadedWeights
from ms_quant.quantization.work import BlockWork
from ms_quant.schemes.table import DYNAMIC_CACHE
from ms_quant.statistics.errors import Errors, errors
from ms_quant.statistics.observations import Observations

CACHE_GROUP = "kv_cache"
PREFILL, DECODE = "", "decode"
_JUST_SEEN = GroupWanted(1, hessian=False, histogram=False)


@dataclass(frozen=True)
class Subject:
    """What is analysed.

    Attributes:
        plans: scheme to the plan of the whole model.
        caches: kinds of cache.
        base: a plan that says the type of what stays float.
        probe: which tokens variants run on.
        probed: int32 (windows, tokens), these tokens.
        keeps: the job keeps the quantized linears of each scheme, as those of a format of its own.
    """

    plans: Mapping[str, Plan]
    caches: Sequence[str]
    base: Plan
    probe: Probe
    probed: np.ndarray
    keeps: bool = False

    @property
    def all(self) -> list[Plan]:
        """Every plan."""
        return list(self.plans.values()) or [self.base]


Variant = tuple[str, str, str]
"""Group, scheme and phase."""


def variants_of(
    plans: Mapping[str, Plan], caches: Sequence[str], block: BlockSpec
) -> list[Variant]:
    """The variants that begin in a block, in the order of their states."""
    found = []
    for scheme, plan in plans.items():
        for group in plan.groups(block.index):
            phased = plan.layer(block.index, group).phased
            found += [(group.name, scheme, phase) for phase in (PREFILL, DECODE)[: 1 + phased]]
    return found + [(CACHE_GROUP, kind, PREFILL) for kind in caches if block.cached]


class AnalysisWork(BlockWork):
    """What is to be done to the blocks of an analysis; they are done in order.

    What enters a block in each variant is on disk: first the float model's probe, then that of
    every variant that began before the block.

    Args:
        subject: what is analysed.
        jobs: where results and states are, as the job is for each plan.
        checkpoint: the float model.
        tokens: int32 (windows, tokens) calibration data.
        progress: told how far each block is.
    """

    def __init__(
        self,
        subject: Subject,
        jobs: Sequence[JobDirectory],
        checkpoint: FloatTensors,
        tokens: np.ndarray,
        progress: BlockProgress,
    ):
        targets = list(zip(subject.all, jobs, strict=True))
        super().__init__(targets, checkpoint, tokens, progress)
        self.subject, self.probe = subject, subject.probe
        self._positions = Positions(self.config, self.probe.length)
        self._watches: dict[str, InputWatch] = {}

    def wanted(self, index: int) -> Wanted:
        """See :class:`BlockWork`: of a group that no plan quantizes, too, statistics are kept."""
        found = super().wanted(index)
        groups = {g.name: _JUST_SEEN for g in self.config.block(index).groups} | dict(found.groups)
        return replace(found, groups=groups, cache=bool({*self.subject.caches} - {DYNAMIC_CACHE}))

    def unfinished(self) -> list[int]:
        """See :class:`BlockWork`: blocks that predict further tokens change no prediction here."""
        return [index for index in super().unfinished() if index < self.config.num_layers]

    def by_experts(self, index: int) -> bool:
        """See :class:`BlockWork`: variants of all groups run through the whole block."""
        return False

    def watchers(self, index: int) -> Mapping[str, Observer]:
        """See :class:`BlockWork`."""
        windows, length, _ = self.shape(index)
        self._watches = {
            group.name: InputWatch(windows, length, group.routed)
            for group in self.config.block(index).groups
        }
        return {name: watch.look for name, watch in self._watches.items()}

    def finish(self, index: int, observations: Observations | None) -> None:
        """Measures a block's variants and takes those of earlier blocks through it."""
        assert observations is not None
        block = self.block(index, observations.divided)
        source, old = self._entering(index), len(self._begun(index))
        count = len(self.probe.windows)
        new = variants_of(self.subject.plans, self.subject.caches, block.spec)
        states = self._states(index + 1, old + len(new))
        exact = FloatBlock(block, self._positions, source(0, count))
        states.append(exact.output)
        batch, total = self.budget.windows(self.probe.length), count * (1 + old)
        for start in range(count, total, batch):
            states.append(block.run(source(start, min(start + batch, total)), self._positions))
            self.progress(index, 0.5 + 0.25 * min(1.0, (start + batch) / total))
        found: dict[str, dict[str, Any]] = {}
        kept = QuantizedBlock()
        for done, (variant, own, output) in enumerate(self._changed(exact, observations, kept), 1):
            states.append(output)
            found.setdefault(variant[0], {})["/".join(variant[1:])] = _facts(
                own, errors(output, exact.output)
            )
            self.progress(index, 0.75 + 0.25 * done / len(new))
        states.commit()
        kept.notes = {"errors": found, "inputs": self._inputs(observations)}
        kept.ranges = observations.ranges.facts(observations.divided)
        self.job.finish_block(index, kept, {})
        self.job.probe_file(index).unlink(missing_ok=True)
        self._loaded = None
        self._drop_hidden()

    def loss_increases(self) -> dict[tuple[int, Variant], float]:
        """Block and variant to the mean divergence of what the model predicts in the end."""
        last = self.config.num_layers
        gain = self.checkpoint.read_float32("model.norm.weight")
        ends = _Ends(self._stored(last), self.probe, gain, self.config.rms_norm_eps)
        head = self.checkpoint.float32_chunks(head_name(self))
        begun = self._begun(last)
        means = divergences(head, ends.of(0), ends).mean(axis=1)
        return dict(zip(begun, means.tolist(), strict=True))

    def _begun(self, index: int) -> list[tuple[int, Variant]]:
        """The variants that begin before a block."""
        return [
            (block.index, variant)
            for block in self.config.blocks
            if block.index < index
            for variant in variants_of(self.subject.plans, self.subject.caches, block)
        ]

    def _entering(self, index: int) -> Callable[[int, int], np.ndarray]:
        """What gives some of the states that enter a block."""
        if index:
            stored = self._stored(index)
            return lambda start, stop: stored[start:stop]
        tokens = self.subject.probed
        rows = used_rows(self.checkpoint.float32_chunks(EMBEDDING), tokens)
        embedded = rows(tokens)
        return lambda start, stop: embedded[start:stop]

    def _shape(self, variants: int) -> tuple[int, int, int]:
        windows = len(self.probe.windows) * (1 + variants)
        return windows, self.probe.length, self.config.hidden_size

    def _states(self, index: int, variants: int) -> HiddenStates:
        return HiddenStates(self.job.probe_file(index), self._shape(variants))

    def _stored(self, index: int) -> StoredStates:
        """What enters a block in all variants that begin before it."""
        return StoredStates(self.job.probe_file(index), self._shape(len(self._begun(index))))

    def _changed(
        self, exact: FloatBlock, observations: Observations, kept: QuantizedBlock
    ) -> Iterator[tuple[Variant, Errors, np.ndarray]]:
        """Each variant that begins in a block, the errors of its group, and its output.

        What is to be kept of the first plan's linears goes to ``kept``, that of others to disk.
        """
        block, at = exact.block, self.at(exact.block.index)
        for (scheme, plan), (_, job) in zip(self.subject.plans.items(), self.targets, strict=False):
            made = quantize(plan, LoadedWeights(block, at), observations, alone=True)
            if self.subject.keeps and job is self.job:
                kept.linears |= made.linears
            elif self.subject.keeps:
                job.finish_block(block.index, QuantizedBlock(dict(made.linears)), {})
            for group in plan.groups(block.index):
                linears = {path: made.linears.pop(path) for path in group.members}
                for phase, forward in zip((PREFILL, DECODE), phases(linears), strict=False):
                    output = exact.outputs(group, forward)
                    yield (group.name, scheme, phase), exact.own(group, forward), output
        for kind in self.subject.caches if block.spec.cached else ():
            own, output = exact.with_cache(self._cache(kind, block.spec, observations))
            yield (CACHE_GROUP, kind, PREFILL), own, output

    def _cache(self, kind: str, spec: BlockSpec, seen: Observations) -> Callable[[], KeyValueCache]:
        """What makes an empty cache of a kind."""
        if kind == DYNAMIC_CACHE:
            return Int8KeyValueCache
        assert seen.cache is not None
        return static_cache(spec, cache_scales(spec, kind, self.subject.base.dtype, seen.cache))

    def _inputs(self, observations: Observations) -> dict[str, Any]:
        watched = self._watches.items()
        return {name: asdict(watch.facts(observations.stats[name])) for name, watch in watched}


class _Ends:
    """What the last norm makes of the states of each variant, read when it is asked for."""

    def __init__(self, states: StoredStates, probe: Probe, gain: np.ndarray, eps: float):
        self.count, self.gain, self.eps = len(probe.windows), gain, eps
        self.states = states

    def __len__(self) -> int:
        return len(self.states) // self.count - 1

    def __getitem__(self, variant: int) -> np.ndarray:
        return self.of(variant + 1)

    def of(self, row: int) -> np.ndarray:
        """float32 (tokens, hidden) of a row of states: 0 is the float model."""
        states = self.states[row * self.count : (row + 1) * self.count]
        return kernels.rms_norm(states, self.gain, self.eps).reshape(-1, states.shape[-1])


def _facts(own: Errors, block: Errors) -> dict[str, float]:
    names = "output_error", "output_mse", "block_error", "block_mse"
    found = dict(zip(names, (*own, *block), strict=True))
    assert all(map(math.isfinite, found.values())), found
    return found
