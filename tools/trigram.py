"""An interpolated trigram model: the bar that a trained language model has to clear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class InterpolatedTrigram:
    """Interpolated Witten-Bell smoothing over trigram, bigram, unigram and uniform.

    p(w | h) = (count(h, w) + types(h) * p(w | shorter h)) / (count(h) + types(h))
    """

    vocabulary: int
    unigram: np.ndarray
    bigram: dict[int, tuple[int, int]]  # context -> (count, distinct followers)
    bigram_pairs: dict[int, int]
    trigram: dict[int, tuple[int, int]]
    trigram_pairs: dict[int, int]

    @classmethod
    def fit(cls, ids: np.ndarray, vocabulary: int) -> InterpolatedTrigram:
        ids = ids.astype(np.int64)
        counts = np.bincount(ids, minlength=vocabulary)
        types = int((counts > 0).sum())
        unigram = (counts + types / vocabulary) / (counts.sum() + types)
        pairs = ids[:-1] * vocabulary + ids[1:]
        triples = (pairs[:-1] * vocabulary) + ids[2:]
        bigram, bigram_pairs = _contexts(pairs, vocabulary)
        trigram, trigram_pairs = _contexts(triples, vocabulary)
        return cls(vocabulary, unigram, bigram, bigram_pairs, trigram, trigram_pairs)

    def probability(self, before: int, last: int, word: int) -> float:
        p = float(self.unigram[word])
        p = _mix(p, self.bigram.get(last), self.bigram_pairs.get(last * self.vocabulary + word, 0))
        context = before * self.vocabulary + last
        return _mix(
            p,
            self.trigram.get(context),
            self.trigram_pairs.get(context * self.vocabulary + word, 0),
        )

    def perplexity(self, ids: np.ndarray) -> float:
        """Perplexity of the tokens from the third on."""
        values = ids.tolist()
        logs = [np.log(self.probability(*values[i : i + 3])) for i in range(len(values) - 2)]
        return float(np.exp(-np.mean(logs)))


def _mix(shorter: float, context: tuple[int, int] | None, count: int) -> float:
    if context is None:
        return shorter
    total, types = context
    return (count + types * shorter) / (total + types)


def _contexts(grams: np.ndarray, vocabulary: int):
    unique, counts = np.unique(grams, return_counts=True)
    contexts = unique // vocabulary
    keys, first = np.unique(contexts, return_index=True)
    totals = np.add.reduceat(counts, first)
    types = np.diff(np.append(first, len(contexts)))
    table = {int(k): (int(t), int(d)) for k, t, d in zip(keys, totals, types, strict=True)}
    return table, {int(u): int(c) for u, c in zip(unique, counts, strict=True)}
