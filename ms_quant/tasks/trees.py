"""Requests that begin alike as trees of tokens, so that what they share is computed once.

A batch is: a prefix that all its requests share (the examples of a subject), which comes from a
cache; then for each request what its continuations share (the question), and the rest of each
continuation. All tokens of a batch are one sequence; its mask says which sees which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ms_quant.models.attention import MASKED
from ms_quant.tasks.encoding import Request

BATCH_TOKENS = 512  # of one batch, but one request at least: masked scores are computed, too
WORTH = 16  # tokens of a prefix that is computed apart


@dataclass(frozen=True)
class Targets:
    """Tokens that are predicted.

    Attributes:
        rows: which of the batch's tokens predicts each.
        tokens: the ids.
        request: number of the request.
        choice: which continuation.
    """

    rows: np.ndarray
    tokens: np.ndarray
    request: int
    choice: int


@dataclass
class Batch:
    """Some requests as one sequence behind a prefix.

    Attributes:
        prefix: how many tokens are in the cache.
        tokens: ids, one after the other.
        depths: the position of each.
        spans: (first, stop, behind) of each run of tokens; a token sees the prefix, the span
            ``behind`` its own if there is one, and those of its own span up to itself.
        targets: what is predicted.
        ends: (request, row) of the token after which each request's first continuation begins.
    """

    prefix: int
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, tuple[int, int] | None]] = field(default_factory=list)
    targets: list[Targets] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)

    @property
    def mask(self) -> np.ndarray:
        """Additive float32 (1, 1, tokens, prefix + tokens)."""
        count = len(self.tokens)
        mask = np.full((count, self.prefix + count), MASKED, np.float32)
        mask[:, : self.prefix] = 0
        own = mask[:, self.prefix :]
        for first, stop, behind in self.spans:
            own[first:stop, first:stop][np.tri(stop - first, dtype=bool)] = 0
            if behind is not None:
                own[first:stop, behind[0] : behind[1]] = 0
        return mask[None, None]

    def add(self, number: int, rows: Rows) -> None:
        """Appends a request.

        Args:
            number: of the request.
            rows: what is computed of it.
        """
        shared = self._span(rows.tokens[0][self.prefix : rows.shared], self.prefix, None)
        if not rows.targets:
            self.ends.append((number, shared[1] - 1))
        for choice, target in enumerate(rows.targets):
            tokens = rows.tokens[choice]
            rest = self._span(tokens[rows.shared :], rows.shared, shared)
            at = np.arange(len(tokens) - len(target), len(tokens))
            here = np.where(
                at < rows.shared, at - self.prefix + shared[0], at - rows.shared + rest[0]
            )
            self.targets.append(Targets(here, target, number, choice))
            if not choice:
                self.ends.append((number, int(here[0])))

    def _span(
        self, tokens: np.ndarray, depth: int, behind: tuple[int, int] | None
    ) -> tuple[int, int]:
        first = len(self.tokens)
        self.tokens += tokens.tolist()
        self.depths += range(depth, depth + len(tokens))
        place = first, len(self.tokens)
        self.spans.append((*place, behind))
        return place


@dataclass(frozen=True, eq=False)
class Rows:
    """The sequences of a request.

    Attributes:
        tokens: ids of each, without the last token of the continuation, which nothing reads.
        targets: ids of the continuations; none where there are none.
        shared: how many tokens all sequences begin with.
        free: how many tokens come before the first that predicts.
        cut: whether a sequence is longer than the model takes, and lost its beginning.
    """

    tokens: tuple[np.ndarray, ...]
    targets: tuple[np.ndarray, ...]
    shared: int
    free: int
    cut: bool

    @classmethod
    def of(cls, request: Request, longest: int) -> Rows:
        """Those of a request.

        Args:
            request: the request.
            longest: positions that the model was made for.
        """
        if not request.continuations:
            tokens = request.context[-longest:]
            cut = len(tokens) < len(request.context)
            return cls((tokens,), (), len(tokens), len(tokens) - 1, cut)
        whole = [np.concatenate([request.context, more]) for more in request.continuations]
        rows = tuple(ids[-(longest + 1) :][:-1] for ids in whole)
        targets = tuple(
            more[-len(row) :] for more, row in zip(request.continuations, rows, strict=True)
        )
        free = min(len(row) - len(target) for row, target in zip(rows, targets, strict=True))
        cut = any(len(row) < len(ids) - 1 for row, ids in zip(rows, whole, strict=True))
        return cls(rows, targets, common(rows), free, cut)

    @property
    def count(self) -> int:
        """How many tokens are computed."""
        return self.shared + sum(len(tokens) - self.shared for tokens in self.tokens)


def common(rows: Sequence[np.ndarray]) -> int:
    """How many tokens some sequences begin with that are the same in all."""
    length = min(map(len, rows))
    first = rows[0][:length]
    for row in rows[1:]:
        differing = np.flatnonzero(row[: len(first)] != first)
        first = first[: differing[0]] if len(differing) else first
    return len(first)


@dataclass(frozen=True)
class Group:
    """Requests that share a prefix.

    Attributes:
        prefix: ids of the prefix; maybe none.
        batches: of what comes behind it.
    """

    prefix: np.ndarray
    batches: tuple[Batch, ...]

    @property
    def count(self) -> int:
        """How many tokens are computed."""
        return len(self.prefix) + sum(len(batch.tokens) for batch in self.batches)


def grouped(
    rows: Sequence[Rows], first: int = 0, batch_tokens: int = BATCH_TOKENS, sharing: bool = True
) -> Group:
    """The requests of one subject.

    Args:
        rows: of each request.
        first: number of the first request.
        batch_tokens: of one batch, but one request at least.
        sharing: whether a prefix of all is looked for.
    """
    prefix = 0
    if sharing and len(rows) > 1:
        length = min(
            common([one.tokens[0] for one in rows]), *(min(one.shared, one.free) for one in rows)
        )
        prefix = length if length >= WORTH else 0
    return Group(rows[0].tokens[0][:prefix], tuple(_batches(rows, first, prefix, batch_tokens)))


def _batches(rows: Sequence[Rows], first: int, prefix: int, limit: int) -> Iterator[Batch]:
    """Requests of like length together, the longest first, so that what is left is told well."""
    batch = Batch(prefix)
    for which in sorted(range(len(rows)), key=lambda i: -rows[i].count):
        if batch.tokens and len(batch.tokens) + rows[which].count - prefix > limit:
            yield batch
            batch = Batch(prefix)
        batch.add(first + which, rows[which])
    yield batch
