"""The work on a block with experts, one expert after the other.

In memory are what the block has beside its experts, one expert, and some tokens. A kill loses one
expert's work at most. The stages, each of which ends with files that have their names:

1. all windows pass what comes before the experts: ``stream``, the residual stream there;
   ``routes``, which tokens go to which expert; and ``seen``, what was seen so far;
2. each expert is read, computes for its tokens, is quantized and written, and what it ``gave`` to
   its tokens, too; no weight is read a second time, unless what all experts read is smoothed: then
   the largest magnitudes of all their weights come first, ``maxima``;
3. all windows pass what is beside the experts, and all that was given is added.

An expert that few tokens go to is seen on others, too: it computes for them, but what it gives
them is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ms_quant.algorithms.problem import InputMaxima
from ms_quant.files.checked_file import CheckedFile, write_checked
from ms_quant.job.states import HiddenStates, StoredStates
from ms_quant.models.block_forward import BlockForward
from ms_quant.models.experts import NORM, Experts
from ms_quant.models.names import expert_of
from ms_quant.quantization.block import quantize
from ms_quant.quantization.folding import with_weights
from ms_quant.quantization.observe import Watched, divide, nothing_seen
from ms_quant.quantization.weights import ExpertWeights, StoredWeights, Weights
from ms_quant.statistics.kept import spread
from ms_quant.statistics.observations import Observations

if TYPE_CHECKING:
    from pathlib import Path

    from ms_quant.quantization.work import BlockWork

FEW_TOKENS = 64
"""Of fewer tokens an expert is seen on others, too: the largest of n values is passed by one in n
of those that follow, here by more than 1.6 % of them."""
SEEN_TOKENS = 2048
"""How many others, evenly spread over all."""
BEFORE, MAXIMA, EXPERTS = 0.15, 0.2, 0.8
"""Which part of a block is done after the first stage, when the largest magnitudes of experts are
known, and after the second."""


class Routes(NamedTuple):
    """Which tokens of all windows go to which expert of a block.

    Attributes:
        chosen: int32 (tokens, per token), ascending.
        weights: float32 (tokens, per token), what their outputs are multiplied by.
    """

    chosen: np.ndarray
    weights: np.ndarray

    def of(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of an expert, ascending, and float32 (tokens, 1)."""
        tokens, place = np.nonzero(self.chosen == expert)
        return tokens, self.weights[tokens, place, None]

    def facts(self, experts: int, all_tokens: bool) -> dict[str, Any]:
        """How many tokens came to how many experts, for the record."""
        counts = np.bincount(self.chosen.reshape(-1), minlength=experts)
        few = np.flatnonzero(counts < FEW_TOKENS)
        return {
            "tokens": len(self.chosen),
            "least": int(counts.min()),
            "mean": float(counts.mean()),
            "most": int(counts.max()),
            "counts": counts.tolist(),
            "none": np.flatnonzero(counts == 0).tolist(),
            "seen_on_others": list(range(experts)) if all_tokens else few.tolist(),
        }


def part_groups(work: BlockWork, index: int, expert: int | None) -> list[str]:
    """Names of the groups of an expert of a block, or those that are of none."""
    groups = work.config.block(index).groups
    return [group.name for group in groups if expert_of(f"{group.name}.") == expert]


def finish_stored(work: BlockWork, index: int) -> None:
    """Quantizes what is left of a block's experts from their weights alone."""
    left = _left(work, index)
    for done, expert in enumerate(left, 1):
        _finish(work, index, expert, StoredWeights(work.checkpoint, index), None)
        work.progress(index, done / (len(left) + 1))


def _left(work: BlockWork, index: int) -> list[int]:
    """The experts of a block that are not finished."""
    branch = experts_of(work, index)
    done = work.job.finished_experts(index)
    return [expert for expert in range(len(branch.experts)) if expert not in done]


def experts_of(work: BlockWork, index: int) -> Experts:
    """The branch of a block that has experts."""
    branch = work.config.block(index).branches[-1]
    assert isinstance(branch, Experts)
    return branch


def _finish(
    work: BlockWork,
    index: int,
    expert: int,
    weights: Weights,
    seen: Observations | None,
    maxima: Callable[[], InputMaxima] | None = None,
) -> None:
    """Quantizes an expert for each format, and commits it; that of the first format comes last."""
    names, norms = part_groups(work, index, expert), work.norms(seen)
    for plan, job in reversed(work.targets):
        block = quantize(plan, weights, seen, work.hooks, only=names, maxima=maxima)
        job.finish_block(index, block, norms if job.target == 0 else {}, expert)


class RoutedBlock:
    """The calibrated work on a block with experts.

    Args:
        work: the work that it is part of.
        index: the block.
    """

    def __init__(self, work: BlockWork, index: int):
        self.work, self.index, self.job = work, index, work.job
        self.branch = experts_of(work, index)
        self.which = len(work.config.block(index).branches) - 1
        self.wanted = work.wanted(index)
        self.shape = work.shape(index)

    def observe(self) -> Observations:
        """Finishes the experts, and gives what was seen of the rest."""
        seen = self._before()
        left = _left(self.work, self.index)
        for done, expert in enumerate(left, 1):
            self._expert(expert)
            part = (len(self.branch.experts) - len(left) + done) / len(self.branch.experts)
            self.work.progress(self.index, MAXIMA + (EXPERTS - MAXIMA) * part)
        return self._after(seen)

    def facts(self) -> dict[str, Any]:
        """What the record says of its experts."""
        return self.routes.facts(len(self.branch.experts), self.work.all_tokens)

    def drop(self) -> None:
        """Deletes the files of a block that is finished."""
        experts = range(len(self.branch.experts))
        given = [self.job.given_file(self.index, expert) for expert in experts]
        for path in (*self._files, self.job.maxima_file(self.index), *given):
            path.unlink(missing_ok=True)

    @property
    def _files(self) -> tuple[Path, Path, Path]:
        """Those of the first stage, in the order in which they are written."""
        job, index = self.job, self.index
        return job.stream_file(index), job.routes_file(index), job.seen_file(index)

    @cached_property
    def routes(self) -> Routes:
        """Where the tokens go, as the first stage has found it."""
        file = CheckedFile(self.job.routes_file(self.index))
        return Routes(file.read("chosen"), file.read("weights"))

    def maxima(self) -> InputMaxima:
        """What is known of the input of all experts; their weights are read the first time."""
        work, path = self.work, self.job.maxima_file(self.index)
        if not path.exists():
            prefix, read = work.prefix(self.index), work.checkpoint.read_float32
            found = with_weights(
                work.targets[0][0],
                self.index,
                self.branch.edges[0],
                CheckedFile(self._files[1]).read("largest"),
                lambda member, _: read(f"{prefix}{member}.weight"),
                lambda part: work.progress(self.index, BEFORE + (MAXIMA - BEFORE) * part),
            )
            write_checked(path, {"activations": found.activations, "columns": found.columns})
        file = CheckedFile(path)
        return InputMaxima(file.read("activations"), file.read("columns"))

    def _before(self) -> Observations:
        """The first stage."""
        stream, routes, seen_file = self._files
        if seen_file.exists():
            return _restored(seen_file)
        work = self.work
        rest = [name for name in self.wanted.groups if expert_of(f"{name}.") is None]
        wanted = replace(self.wanted, groups={n: self.wanted.groups[n] for n in rest})
        block, seen = work.block(self.index, {}), nothing_seen(self._spec, self.shape, wanted)
        self._pass_before(block, seen, HiddenStates(stream, self.shape), routes)
        divided = seen.ranges.divisions(work.config) if work.narrow else {}
        if divided:  # which changes no output
            divide(block, divided)
            seen = nothing_seen(self._spec, self.shape, wanted)
            self._pass_before(block, seen, None, routes)
            seen.divided = divided
        write_checked(seen_file, seen.arrays(), {"facts": seen.facts()})
        return seen

    def _pass_before(
        self, block: BlockForward, seen: Observations, stream: HiddenStates | None, routes: Path
    ) -> None:
        work, start, found = self.work, 0, list[tuple[np.ndarray, np.ndarray]]()
        largest = np.zeros(self.shape[2], np.float32)
        watched = Watched(block, seen, work.watchers(self.index))
        for batch in work.hidden(self.index, BEFORE):
            with watched.windows(start, len(batch)), np.errstate(all="ignore"):
                x = watched.block.between(block.spec.hidden[0], batch)
                for which in range(self.which):
                    x = watched.block.branch(which, x, work.at(self.index))
                rows = watched.block.norm(NORM, x).reshape(-1, self.shape[2])
                found.append(self.branch.route(watched.block, rows))
                np.maximum(largest, np.abs(rows).max(axis=0), out=largest)
            if stream is not None:
                stream.append(x)
            start += len(batch)
        if stream is not None:
            stream.commit()
        chosen, weights = (np.concatenate(parts) for parts in zip(*found, strict=True))
        found_routes = {"chosen": chosen.astype(np.int32), "weights": weights}
        write_checked(routes, {**found_routes, "largest": largest})

    @property
    def _spec(self) -> Any:
        return self.work.config.block(self.index)

    def _stream(self, tokens: np.ndarray) -> np.ndarray:
        """The residual stream of some tokens before the experts."""
        return self._states.take(tokens)

    @cached_property
    def _states(self) -> StoredStates:
        return StoredStates(self.job.stream_file(self.index), self.shape)

    def _expert(self, expert: int) -> None:
        """The second stage for one expert."""
        work, names = self.work, part_groups(self.work, self.index, expert)
        wanted = replace(
            self.wanted,
            groups={n: self.wanted.groups[n] for n in names if n in self.wanted.groups},
            search_tokens=0,
            cache=False,
        )
        block = self._expert_block(expert)
        tokens, weights = self.routes.of(expert)
        see = partial(self._see, block, expert, tokens, weights, wanted)
        given = self.job.given_file(self.index, expert)
        seen = see(HiddenStates(given, (len(tokens), self.shape[2])))
        divided = seen.ranges.divisions(work.config) if work.narrow else {}
        if divided:
            divide(block, divided)
            seen = see(None)
            seen.divided = divided
        if work.narrow:
            seen.ranges.check_float16()
        stored = StoredWeights(work.checkpoint, self.index)
        searched = partial(self._searched, block, tokens, weights)
        mlp = self.branch.experts[expert]
        loaded = ExpertWeights(block, work.at(self.index), stored, mlp, searched)
        _finish(work, self.index, expert, loaded, seen, self.maxima)

    def _searched(
        self, block: BlockForward, tokens: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The rows that candidates for an expert are tried on, and what its outputs are multiplied
        by there: of its own tokens, or where they are few, of those that it is seen on."""
        factors: np.ndarray | None = weights
        if len(tokens) < FEW_TOKENS:
            tokens, factors = self._others(tokens), None
        picked = spread(len(tokens), min(len(tokens), self.wanted.search_tokens))
        rows = block.norm(NORM, self._stream(tokens[picked]))
        return rows, None if factors is None else factors[picked]

    def _expert_block(self, expert: int) -> BlockForward:
        """The block with the linears of one expert."""
        prefix, read = self.work.prefix(self.index), self.work.checkpoint.read_float32
        spec, path = self._spec, f"{self.branch.experts[expert].path}."
        names = [f"{NORM}.weight", *(name for name in spec.tensors if name.startswith(path))]
        arrays = {name: read(prefix + name) for name in names}
        return BlockForward(self.work.config, self.index, arrays, {}, self.work.budget)

    def _see(
        self,
        block: BlockForward,
        expert: int,
        tokens: np.ndarray,
        weights: np.ndarray,
        wanted: Any,
        given: HiddenStates | None,
    ) -> Observations:
        """What an expert shows of its tokens, and of others where they are few."""
        seen = nothing_seen(self._spec, self.shape, wanted)
        watched, mlp = Watched(block, seen).block, self.branch.experts[expert]
        others = self._others(tokens)
        shown = block if len(others) else watched
        for part in _batches(len(tokens), self.work.budget.batch_tokens):
            with np.errstate(all="ignore"):
                rows = block.norm(NORM, self._stream(tokens[part]))
                y = mlp.outer(shown, mlp.gated(shown, rows))
            if given is not None:
                given.append(weights[part] * y)
        if given is not None:
            given.commit()
        for part in _batches(len(others), self.work.budget.batch_tokens):
            with np.errstate(all="ignore"):
                rows = block.norm(NORM, self._stream(others[part]))
                mlp.outer(watched, mlp.gated(watched, rows))
        return seen

    def _others(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens on which an expert is seen, where they are not its own."""
        count = len(self.routes.chosen)
        if self.work.all_tokens:
            return np.arange(count)
        if len(tokens) >= FEW_TOKENS:
            return tokens[:0]
        return np.union1d(tokens, spread(count, min(count, SEEN_TOKENS)))

    def _after(self, seen: Observations) -> Observations:
        """The third stage."""
        work, following = self.work, self.work.following(self.index)
        block = work.block(self.index, seen.divided)
        self._pass_after(block, seen, following)
        if following is not None:
            following.commit()
        divided = seen.ranges.divisions(work.config) if work.narrow else {}
        if divided.keys() - seen.divided.keys():
            seen = _restored(self.job.seen_file(self.index))
            block = work.block(self.index, {**divided, **seen.divided})
            self._pass_after(block, seen, None)
            seen.divided = {**divided, **seen.divided}
        if work.narrow:
            seen.ranges.check_float16()
        return seen

    def _pass_after(
        self, block: BlockForward, seen: Observations, following: HiddenStates | None
    ) -> None:
        work, (windows, length, hidden) = self.work, self.shape
        watched, state = Watched(block, seen, work.watchers(self.index)), self.which + 1
        given = [self._given(expert) for expert in range(len(self.branch.experts))]
        for part in _batches(windows, work.budget.windows(length)):
            x = self._states[part]
            first, count = part.start * length, len(x) * length
            y = np.zeros((count, hidden), np.float32)
            for tokens, rows in given:
                begin, end = np.searchsorted(tokens, [first, first + count])
                y[tokens[begin:end] - first] += rows[begin:end]
            with watched.windows(part.start, len(x), state), np.errstate(all="ignore"):
                inner = self.branch.shared_inner(
                    watched.block, block.norm(NORM, x).reshape(-1, hidden)
                )
                if inner is not None:
                    y += self.branch.shared_outer(watched.block, inner)
                output = np.add(x, y.reshape(x.shape))
                watched.block.between(block.spec.hidden[-1], output)
            if following is not None:
                following.append(output)
            work.progress(self.index, EXPERTS + 0.1 * min(1.0, part.stop / windows))

    def _given(self, expert: int) -> tuple[np.ndarray, StoredStates | np.ndarray]:
        """The tokens of an expert and what it gave to them."""
        tokens, _ = self.routes.of(expert)
        if not len(tokens):
            return tokens, np.zeros((0, self.shape[2]), np.float32)
        shape = len(tokens), self.shape[2]
        return tokens, StoredStates(self.job.given_file(self.index, expert), shape)


def _batches(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _restored(path: Path) -> Observations:
    file = CheckedFile(path)
    arrays = {name: file.read(name) for name in file.tensors}
    return Observations.restore(arrays, file.metadata["facts"])
