"""Which values a weight uses: the levels of each price that make error + price * bits least.

Lloyd's iteration with code lengths, over a sample of the weights. Each weight counts as much as
its column does in the column step. It begins with evenly spaced levels, once with one at zero and
once with zero half way between two, and keeps the better end.

Source: Chou, Lookabaugh, Gray, "Entropy-constrained vector quantization" (1989), with the codec's
fixed code lengths in place of the entropy.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sparse_compress.rate.dictionary import BITS, FIRST_BITS, Dictionary, mean_first_bits

SAMPLES = 16384
SPACINGS = (1.5, 2.2, 3.2)
"""Of the levels to begin with, in square roots of the price of a bit."""
TRIES, SETTLES = 12, 30
TRIED = slice(None, None, 4)
"""The samples that show which of the beginnings is best."""
CHEAPEST = int(np.count_nonzero(FIRST_BITS == BITS))
STEPS_BETWEEN = 12
"""Steps of the int8 grid between two of the cheapest levels, at least."""
Doubles = NDArray[np.float64]
Singles = NDArray[np.float32]


def sample(weight: Singles, importance: Doubles) -> tuple[Singles, Singles]:
    """Evenly spread weights and the importance of their columns, at most SAMPLES."""
    flat = weight.reshape(-1)
    chosen = np.arange(min(SAMPLES, flat.size)) * flat.size // max(1, min(SAMPLES, flat.size))
    return flat[chosen], importance[chosen % weight.shape[1]].astype(np.float32)


def find_levels(weight: Singles, importance: Doubles, price: float) -> Doubles:
    """The levels of a weight.

    Args:
        weight: (out, in), not all zero.
        importance: float64 (in,), positive: what a squared error in each column costs.
        price: what a bit costs, positive.

    Returns:
        float64 (36,): levels by rank, in the unit of the weight.
    """
    x, counts_as = sample(weight, importance)
    reach = float(np.abs(x).max()) or float(np.abs(weight).max())
    unit = math.sqrt(price / math.exp(float(np.log(importance).mean())))
    starts = [
        _evenly(offset, min(spacing * unit, reach), reach)
        for offset in (0.0, 0.5)
        for spacing in SPACINGS
    ]
    few = x[TRIED], counts_as[TRIED]
    tried = [_settle(*few, price, levels, TRIES) for levels in starts]
    best = min(tried, key=lambda found: found[1])[0]
    return _settle(x, counts_as, price, best, SETTLES)[0]


def _evenly(offset: float, spacing: float, reach: float) -> Doubles:
    """Levels to begin with: the cheapest evenly spaced around zero, the rest outside of them."""
    cheap = (np.array([0, -1, 1, 2]) - offset) * spacing
    _, (_, middle, last) = np.unique(BITS, return_counts=True)
    near = np.linspace(cheap.max() + 0.7 * spacing, max(0.8 * reach, 3 * spacing), middle // 2)
    far = np.linspace(0.85 * reach, reach, last // 2)
    low = cheap.min() + cheap.max()
    return np.concatenate([cheap, near, low - near, far, -far])


def _settle(
    x: Singles, counts_as: Singles, price: float, levels: Doubles, rounds: int
) -> tuple[Doubles, float]:
    """Levels after some rounds, ranked, and the mean cost before the last of them moved."""
    share, cost = 0.25, 0.0
    for _ in range(rounds):
        charge = price * BITS.astype(np.float64)
        charge[0] = price * mean_first_bits(share)
        costs = np.square(x[:, None] - levels.astype(np.float32))
        costs *= counts_as[:, None]
        costs += charge.astype(np.float32)
        nearest = costs.argmin(axis=1)
        cost = float(np.take_along_axis(costs, nearest[:, None], 1).mean(dtype=np.float64))
        count = np.bincount(nearest, minlength=len(levels))
        mass = np.bincount(nearest, counts_as, len(levels))
        centre = np.bincount(nearest, counts_as * x, len(levels)) / np.maximum(mass, 1e-300)
        levels = np.where(mass > 0, centre, levels)
        order = np.argsort(-count, kind="stable")
        levels, share = levels[order], float(count[order[0]] / len(x))
    return levels, cost


def to_grid(levels: Doubles, weight: Singles) -> tuple[float, Dictionary]:
    """The step of the int8 grid, and the levels on it.

    The grid reaches the largest weight, unless it would be too coarse for the levels then; rows
    with larger weights get a larger step of their own.
    """
    between = np.diff(np.unique(levels[:CHEAPEST]))
    step = min(float(np.abs(weight).max()) / 127, *between / STEPS_BETWEEN)
    on_grid = np.clip(np.rint(levels / step), -127, 127).astype(np.int64)
    _, first = np.unique(on_grid, return_index=True)
    return step, Dictionary(on_grid[np.sort(first)], 0.25)
