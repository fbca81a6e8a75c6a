"""How likely a checkpoint says that continuations are, block by block in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ms_quant.budget import BUDGET, Budget
from ms_quant.evaluation.caches import new_caches
from ms_quant.evaluation.float32_forward import LastNorm, check_output, load_block
from ms_quant.evaluation.head import EMBEDDING, head_name, require_head
from ms_quant.formats.opening import ServedModel
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.cache import KeyValueCache
from ms_quant.models.embedding import cross_entropy, used_rows
from ms_quant.models.tree_positions import TreePositions
from ms_quant.progress import PartProgress, silent
from ms_quant.tasks.states import StateFile
from ms_quant.tasks.trees import Batch, Group, Targets

HIDDEN_BYTES = 4 << 30  # of hidden states on disk; with more, the blocks pass again
PREDICTIONS = 4096  # rows that one pass of the head takes


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model says of requests.

    Attributes:
        likelihoods: log-likelihood of each continuation, by number of the request and choice.
        ends: the last hidden state of each request's context behind the last norm, float32
            (requests, hidden), in a file of the directory that was given.
    """

    likelihoods: dict[tuple[int, int], float]
    ends: StateFile


def score(
    model: ServedModel,
    groups: Sequence[Group],
    directory: Path,
    progress: PartProgress = silent,
    *,
    kv_cache: str | None = None,
    budget: Budget = BUDGET,
    hidden_bytes: int = HIDDEN_BYTES,
) -> Scores:
    """Scores requests. All of them go through a block before the next one is read.

    Args:
        model: what ``ms_quant.open_model`` opened.
        groups: the requests.
        directory: for files of hidden states.
        progress: told how far it is.
        kv_cache: how keys and values are cached; None is as the checkpoint says.
        budget: what bounds the memory of a forward.
        hidden_bytes: of hidden states on disk. Where all need more, some requests go through all
            blocks first, then the others.

    Raises:
        MsQuantError: the model has no head, or its activations overflow.
    """
    require_head(model)
    config = model.config
    requests = sum(len(batch.ends) for group in groups for batch in group.batches)
    scores = Scores({}, StateFile(directory / "ends", requests, config.hidden_size))
    limit = max(1, hidden_bytes // (4 * config.hidden_size))
    rounds = list(_rounds(groups, limit))
    total = config.num_layers * sum(group.count for some in rounds for group in some)
    done = 0

    def told(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done / total)

    for number, some in enumerate(rounds):
        path = directory / f"hidden-{number}"
        count = sum(group.count for group in some)
        states = StateFile(path, count, config.hidden_size)
        one = _Round(model, some, states, kv_cache, budget)
        one.embed()
        for index in range(config.num_layers):
            one.block(index, told)
        one.predict(scores)
        states.close()
    return scores


def _rounds(groups: Sequence[Group], limit: int) -> Iterator[list[Group]]:
    """Groups whose hidden states are at most so many rows; a group may be divided."""
    held: list[Group] = []
    room = limit
    for group in groups:
        batches: list[Batch] = []
        room -= len(group.prefix)
        for batch in group.batches:
            if (held or batches) and room < len(batch.tokens):
                yield [*held, *([replace(group, batches=tuple(batches))] if batches else [])]
                held, batches, room = [], [], limit - len(group.prefix)
            batches.append(batch)
            room -= len(batch.tokens)
        held.append(replace(group, batches=tuple(batches)))
    if held:
        yield held


class _Round:
    """Groups that go through the blocks together.

    Args:
        model: the checkpoint.
        groups: the groups.
        states: of all their tokens: of each group its prefix, then its batches.
        kv_cache: how keys and values are cached.
        budget: what bounds the memory of a forward.
    """

    def __init__(
        self,
        model: ServedModel,
        groups: Sequence[Group],
        states: StateFile,
        kv_cache: str | None,
        budget: Budget,
    ):
        self.model, self.groups, self.states, self.budget = model, groups, states, budget
        self.new_caches = new_caches(model, kv_cache)

    def embed(self) -> None:
        """Writes the first hidden states."""
        parts = [
            np.asarray(ids, np.int64)
            for group in self.groups
            for ids in (group.prefix, *(batch.tokens for batch in group.batches))
        ]
        rows = used_rows(self.model.chunks(EMBEDDING), np.concatenate(parts))
        first = 0
        for ids in parts:
            self.states.write(first, rows(ids))
            first += len(ids)

    def block(self, index: int, told: Callable[[int], None]) -> None:
        """Writes the hidden states after a block over those before it."""
        block = load_block(self.model, index, self.budget)
        config, first = self.model.config, 0
        for group in self.groups:
            cache, size = self.new_caches[index](), len(group.prefix)
            if size:
                self._run(block, first, size, Positions(config, size), cache)
            first += size
            told(size)
            for batch in group.batches:
                cache.shorten(size)
                at = TreePositions(config, np.array(batch.depths), batch.mask)
                self._run(block, first, len(batch.tokens), at, cache)
                first += len(batch.tokens)
                told(len(batch.tokens))

    def _run(
        self, block: BlockForward, first: int, count: int, at: Positions, cache: KeyValueCache
    ) -> None:
        made = block(self.states.read(first, count)[None], at, cache)
        self.states.write(first, check_output(made, block.index)[0])

    def predict(self, scores: Scores) -> None:
        """Adds what the last hidden states say to the scores."""
        norm, first, count = LastNorm(self.model), 0, 0
        held: list[tuple[np.ndarray, Targets]] = []
        for group in self.groups:
            first += len(group.prefix)
            for batch in group.batches:
                rows = norm(self.states.read(first, len(batch.tokens)))
                first += len(batch.tokens)
                for request, row in batch.ends:
                    scores.ends.write(request, rows[row])
                for targets in batch.targets:
                    held.append((rows[targets.rows], targets))
                    count += len(targets.tokens)
                    if count >= PREDICTIONS:
                        self._predict(held, scores)
                        held, count = [], 0
        if held:
            self._predict(held, scores)

    def _predict(self, held: Sequence[tuple[np.ndarray, Targets]], scores: Scores) -> None:
        rows = np.concatenate([part for part, _ in held])
        ids = np.concatenate([targets.tokens for _, targets in held])
        head = self.model.chunks(head_name(self.model))
        losses = cross_entropy(head, rows, ids, self.budget.logit_bytes)
        first = 0
        for _, targets in held:
            stop = first + len(targets.tokens)
            scores.likelihoods[targets.request, targets.choice] = -float(losses[first:stop].sum())
            first = stop
