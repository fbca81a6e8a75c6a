"""Which token comes next, and how likely tokens are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST = -9999.0  # the logarithm of a probability that is 0: JSON knows no infinity


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: what logits are divided by; 0 takes the most likely token.
        top_p: tokens are drawn from the most likely ones that have this much together.
        top_k: tokens are drawn from so many; 0 for all.
        seed: of the draws; None for another one each time.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def generator(self, index: int = 0) -> np.random.Generator:
        """What draws the tokens of one of several answers."""
        seed = None if self.seed is None else [self.seed, index]
        return np.random.default_rng(seed)


def choose(logits: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    """The next token.

    Args:
        logits: float32 (vocab,).
        sampling: how it is drawn.
        rng: what draws it; one number is taken for each token that is not the most likely one.
    """
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    wide = logits.astype(np.float64)
    shifted = (wide - wide.max()) / sampling.temperature
    order = np.argsort(-shifted, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    powers = np.exp(shifted[order])
    total = np.cumsum(powers)
    if sampling.top_p < 1:
        kept = 1 + int(np.searchsorted(total, sampling.top_p * total[-1]))
        order, total = order[:kept], total[:kept]
    drawn = int(np.searchsorted(total, rng.random() * total[-1], side="right"))
    return int(order[min(drawn, len(order) - 1)])


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability; None of a text's first token.
        top: the most likely tokens there, the first one first, with theirs.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def logprobs(logits: np.ndarray, tokens: list[int], count: int) -> list[TokenLogprob]:
    """How likely tokens were, of the logits before any temperature.

    Args:
        logits: float32 (rows, vocab).
        tokens: one of each row.
        count: how many of the most likely tokens are told.
    """
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    np.maximum(wide, LEAST, out=wide)
    found = []
    for row, token in zip(wide, tokens, strict=True):
        top: list[int] = []
        if count:
            some = np.argpartition(-row, min(count, len(row)) - 1)[:count]
            top = sorted((int(i) for i in some), key=lambda i: (-row[i], i))
        found.append(TokenLogprob(token, float(row[token]), tuple((i, float(row[i])) for i in top)))
    return found
