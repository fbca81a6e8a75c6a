"""What the int8 values of a weight cost, and which of them is best for a target."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparse_compress.codec.format import LITERAL, LOW, count_bytes, rank_counts
from sparse_compress.codec.fractal import COLUMNS
from sparse_compress.codec.pricing import UNIT, code_units

Floats = NDArray[np.float32]
Codes = NDArray[np.int8]

BITS = UNIT * code_units(LOW)[: LOW.dictionary_size]
"""What the values of a dictionary cost by rank, each on its own."""
FIRST_BITS = int(BITS[0])
"""What one d0 costs, and what two side by side cost together."""
LITERAL_BITS = len(LITERAL) + 8
RUN = COLUMNS
"""Columns within which values follow each other in the stream: those of a fractal."""
_CELLS = 512


class Dictionary:
    """The values with a code of their own.

    Args:
        values: int8 (1 to 36,), by rank.
        first_share: how frequent d0 is, 0 to 1.
    """

    def __init__(self, values: NDArray[np.integer], first_share: float):
        self.values, self.first_share = values.astype(np.int8), first_share
        self.first = int(self.values[0])
        ranks = BITS[: len(values)]
        classes = {int(bits): values[1:][ranks[1:] == bits] for bits in np.unique(ranks[1:])}
        self._nearest = {bits: _nearest_table(found) for bits, found in classes.items()}

    @classmethod
    def of(cls, codes: Codes) -> Dictionary:
        """The one that the codec makes for a weight."""
        flat = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
        counts = count_bytes(flat) if flat.size % 2 == 0 else np.bincount(flat, minlength=256)
        ranked = rank_counts(counts, min(LOW.dictionary_size, int(np.count_nonzero(counts)) or 1))
        share = float(counts[ranked[0]] / max(1, flat.size))
        return cls(ranked.view(np.int8), share)

    def same_prices(self, other: Dictionary) -> bool:
        """Whether every value costs the same in both."""
        return self.prices() == other.prices()

    def prices(self) -> dict[int, int]:
        """Value to bits."""
        return dict(zip(self.values.tolist(), BITS.tolist(), strict=False))

    def choose(
        self, target: Floats, price: Floats | float, first_bits: Floats | float
    ) -> tuple[Floats, Floats]:
        """The value that makes ``(target - value)^2 + price * bits`` least, for each target.

        The best of all 255 values is the nearest one of its price, so that one value of each
        price is looked at. Among equal costs d0 wins, then the cheaper code.

        Args:
            target: float32, in steps of the int8 grid.
            price: what a bit costs in squared steps, at least 0; broadcast to the targets.
            first_bits: what d0 costs here, in bits; broadcast.

        Returns:
            The values, float32 and whole numbers from -127 to 127, and their costs.
        """
        best = np.full_like(target, self.first)
        cost = np.square(target - np.float32(self.first)) + price * np.float32(first_bits)
        cell = (2 * target + np.float32(_CELLS // 2)).clip(0, _CELLS - 1).astype(np.intp)
        for bits, table in self._nearest.items():
            _keep_better(best, cost, target, table.take(cell), price * np.float32(bits))
        literal = np.clip(np.rint(target), -127, 127)
        _keep_better(best, cost, target, literal, price * np.float32(LITERAL_BITS))
        return best, cost


def _keep_better(
    best: Floats, cost: Floats, target: Floats, value: Floats, charge: np.ndarray | np.floating
) -> None:
    found = target - value
    found *= found
    found += charge
    np.copyto(best, value, where=found < cost)
    np.minimum(cost, found, out=cost)


def _nearest_table(values: NDArray[np.integer]) -> Floats:
    """The nearest of some whole numbers for each half step from -128 on.

    It is the same within a half step, as the middle of two whole numbers is never inside one.
    """
    ordered = np.sort(values.astype(np.float64))
    centres = (np.arange(_CELLS) - _CELLS // 2 + 0.5) / 2
    after = np.searchsorted(ordered[1:] + ordered[:-1], 2 * centres)
    return ordered[after].astype(np.float32)


def pair_saving(first_share: float) -> float:
    """What a first d0 is worth beyond itself: its code may come to stand for a second one.

    The saving h is what having one d0 open is worth. In the mean over what follows it,
    h = p * (3 - h): the next value is d0 with probability p and then costs nothing, but does not
    open another one.
    """
    return FIRST_BITS * first_share / (1 + first_share)


def mean_first_bits(first_share: float) -> float:
    """What one more d0 costs in the mean, among independent values: the derivative of
    3 p / (1 + p), the bits that d0 takes."""
    return FIRST_BITS / (1 + first_share) ** 2
