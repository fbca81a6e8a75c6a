"""Attention by loops over single tokens, and heads of a kind that was planted."""

from __future__ import annotations

import math

import numpy as np


def slow_attention(q, k, v, keeps, scale=None):
    """float64 (batch, heads, length, size); ``keeps(b, h, i, j)`` says whether a pair counts."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, h, i in np.ndindex(q.shape[:3]):
        keys = [j for j in range(k.shape[2]) if keeps(b, h, i, j)]
        if not keys:
            continue
        scores = [scale * float(q[b, h, i] @ k[b, h, j]) for j in keys]
        weights = [math.exp(s - max(scores)) for s in scores]
        total = sum(weights)
        for weight, j in zip(weights, keys, strict=True):
            out[b, h, i] += weight / total * v[b, h, j]
    return out


def everything(b, h, i, j):
    return True


def slow_pooled_row(query, keys, keep, scale):
    """Which of the mean keys (columns, size) a mean query keeps."""
    scores = [scale * float(np.dot(query, key)) for key in keys]
    weights = [math.exp(s - max(scores)) for s in scores]
    least = sorted(weights)[-keep]
    return [weight >= least for weight in weights]


def planted_heads(shape, size=64, beta=9.0, noise=0.3, seed=0):
    """q and k (1, 4, tokens, size) of a spatial, a temporal, a textural and a uniform head.

    Codes of frames and of places are orthonormal where there is room. The textural head's queries
    are all alike and meet 6 % of the keys.
    """
    rng = np.random.default_rng(seed)
    frames, frame = shape[0], shape[1] * shape[2]
    t, place = np.divmod(np.arange(frames * frame), frame)

    def codes(count):
        found = rng.standard_normal((count, size))
        if count <= size:
            return np.linalg.qr(found.T)[0].T
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    by_frame, by_place = codes(frames)[t], codes(frame)[place]
    one, few = codes(1), (rng.random(len(t)) < 0.06)[:, None]
    nothing = np.zeros((len(t), size))
    queries = [by_frame, by_place, np.repeat(one, len(t), 0), nothing]
    keys = [by_frame, by_place, few * one, nothing]
    factor = math.sqrt(beta) * size**0.25

    def noisy(heads):
        around = noise / math.sqrt(size) * rng.standard_normal((len(heads), len(t), size))
        return ((np.stack(heads) + around) * factor).astype(np.float32)[None]

    return noisy(queries), noisy(keys)
