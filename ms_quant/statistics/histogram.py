"""A running histogram of all values of a tensor, and the ranges of static activations from it.

Bin i covers [i * w, (i + 1) * w), w = 2^e: the grid is anchored at 0 for every tensor. e is the
smallest exponent at which

* the bins from the one of the smallest value to the one of the largest are at most ``bins``, and
* w is at least the spacing of float32 numbers at the largest magnitude, so that |i| <= 2^24.

A value is put into bin floor(x / w), which is exact. When the range grows, e grows, and bin i
becomes bin floor(i / 2^growth): whole bins are joined and no count is ever split. As e follows
from the exact minimum and maximum alone, and never falls, the counts are those of binning every
value at the final e: any order, any batches and any merges give the same ones.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np

from ms_quant.errors import BadArgumentError, BadFileError, short
from ms_quant.numerics.affine import LIMITS, asymmetric_parameters, check_finite
from ms_quant.statistics.stated import fact

QUANTILE_STEPS = 100_000  # a step of the search gives up 1e-5 of the values
SMALLEST_EXPONENT = -149  # every float32 number is a multiple of 2^-149
FLOAT32_MAX = float(np.finfo(np.float32).max)
_CHUNK = 1 << 16  # values at a time: their float64 copy stays in the cache
_BLOCK = 32  # ranges whose errors are computed together


class Histogram:
    """Counts of the values of one tensor, per-tensor.

    Args:
        bins: at most this many bins, at least 2 (a range around 0 needs two, whatever their width).
        name: what the errors call the tensor.

    Attributes:
        low, high: the exact smallest and largest value, floats; inf and -inf before any value.
        exponent: e; a bin is 2^e wide.
        first: i of the first bin, that of ``low``.
        counts: int64 (<= bins,), from the bin of ``low`` to the bin of ``high``.

    Raises:
        MsQuantError: ``bins`` is not an integer of at least 2.
    """

    def __init__(self, bins: int = 2048, name: str = "activation") -> None:
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 2:
            raise BadArgumentError(f"bins: {bins!r}, expected an integer of at least 2")
        self.bins = bins
        self.name = name
        self.low, self.high = math.inf, -math.inf
        self.exponent, self.first = SMALLEST_EXPONENT, 0
        self.counts = np.zeros(0, np.int64)

    def facts(self) -> dict[str, Any]:
        """All but the counts, as JSON; infinite ends, before any value, as None."""
        ends = [None if math.isinf(end) else end for end in (self.low, self.high)]
        return {"bins": self.bins, "name": self.name, "ends": ends, "first": self.first} | {
            "exponent": self.exponent
        }

    @classmethod
    def restore(cls, counts: np.ndarray, facts: Mapping[str, Any]) -> Histogram:
        """The histogram of these counts and :meth:`facts`.

        Raises:
            MsQuantError: they are not those of one histogram.
        """
        made = cls(fact(facts, "bins", int, 2), fact(facts, "name", str))
        ends, made.counts = fact(facts, "ends", list), counts
        expected = SMALLEST_EXPONENT, 0, 0
        if ends != [None, None]:
            within = len(ends) == 2 and all(type(end) is float for end in ends)
            if not within or not -FLOAT32_MAX <= ends[0] <= ends[1] <= FLOAT32_MAX:
                raise BadFileError(f"ends: are {short(ends)}, expected two ascending float32")
            made.low, made.high = ends
            expected = _grid(made.low, made.high, made.bins)
        made.exponent, made.first, _ = expected
        found = fact(facts, "exponent"), fact(facts, "first"), len(counts)
        if found != expected:
            raise BadFileError(
                f"histogram: exponent, first bin and bins are {short(found)}, expected {expected}"
            )
        return made

    @property
    def total(self) -> int:
        """How many values have been counted."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """2^e, the width of a bin."""
        return 2.0**self.exponent

    @property
    def edges(self) -> np.ndarray:
        """float64 (len(counts) + 1,), where the bins begin, and where the last one ends."""
        return (self.first + np.arange(self.counts.size + 1)) * self.width

    def update(self, x: np.ndarray) -> None:
        """Counts the values of an array of any shape; one of size 0 changes nothing.

        Args:
            x: float32 or a type that float32 holds exactly, such as float16 and bfloat16.

        Raises:
            MsQuantError: the type is another, or a value is NaN or inf.
        """
        if not np.can_cast(x.dtype, np.float32):
            raise BadArgumentError(
                f"{self.name}: {x.dtype} values, expected float32 or narrower ones"
            )
        values = np.ravel(x).astype(np.float32, copy=False)
        if not values.size:
            return
        check_finite(values, self.name)
        self._grow(float(values.min()), float(values.max()))
        for start in range(0, values.size, _CHUNK):
            self._count(values[start : start + _CHUNK])

    def _count(self, values: np.ndarray) -> None:
        # In float32 a subnormal quotient below 0 could round to 0, into the wrong bin.
        bins = values.astype(np.float64)
        bins *= 2.0**-self.exponent
        np.floor(bins, out=bins)
        bins -= self.first
        self.counts += np.bincount(bins.astype(np.intp), minlength=self.counts.size)

    def merge(self, other: Histogram) -> None:
        """Adds the counts of another histogram, as if its values had been counted here.

        Raises:
            MsQuantError: the numbers of bins differ.
        """
        if other.bins != self.bins:
            raise BadArgumentError(
                f"{self.name}: a histogram of {other.bins} bins, expected one of {self.bins} bins"
            )
        if other.counts.size:
            self._grow(other.low, other.high)
            self.counts += other._rebinned(self.exponent, self.first, self.counts.size)

    def _grow(self, low: float, high: float) -> None:
        self.low = min(self.low, low) + 0.0  # turns -0.0 into 0.0: order decides which is met first
        self.high = max(self.high, high) + 0.0
        exponent, first, size = _grid(self.low, self.high, self.bins)
        if (exponent, first, size) != (self.exponent, self.first, self.counts.size):
            self.counts = self._rebinned(exponent, first, size)
            self.exponent, self.first = exponent, first

    def _rebinned(self, exponent: int, first: int, size: int) -> np.ndarray:
        """The counts in a grid of bins that are as wide or wider and cover these."""
        # |i| <= 2^24: shifts of 63 and more would give the same 0 or -1 as 63.
        shift = min(exponent - self.exponent, 63)
        bins = (self.first + np.arange(self.counts.size)) >> shift
        counts = np.zeros(size, np.int64)
        np.add.at(counts, bins - first, self.counts)
        return counts

    def percentile_range(self, share: float) -> tuple[np.float32, np.float32]:
        """The smallest range that holds ``share`` of the values with equal shares cut at both ends.

        At most (1 - share) / 2 of the values lie below it, and at most as many above it; its ends
        are bin edges, clipped to the exact minimum and maximum. So it certainly holds ``share`` of
        the values, and exceeds the smallest such range of actual values by at most a bin an end.

        Args:
            share: above 0 and at most 1; 1 is the whole range. Taken as the decimal it is written
                as, so that 0.9 of 20 values are 18.

        Returns:
            (low, high) float32, without rounding: i * w with |i| <= 2^24 is a float32 number.

        Raises:
            MsQuantError: no value was counted, or ``share`` is no such number.
        """
        self._refuse_empty()
        if not 0 < share <= 1:
            raise BadArgumentError(f"share: {share!r}, expected a number above 0 and at most 1")
        cut = math.floor(self.total * (1 - Fraction(repr(float(share)))) / 2)
        start = int(np.searchsorted(np.cumsum(self.counts), cut, side="right"))
        above = int(np.searchsorted(np.cumsum(self.counts[::-1]), cut, side="right"))
        low = max(self.low, (self.first + start) * self.width)
        high = min(self.high, (self.first + self.counts.size - above) * self.width)
        return np.float32(low), np.float32(high)

    def quantization_error(self, low: float, high: float, bits: int = 8) -> float:
        """L2 norm of the error of quantizing all values over a range, float64.

        The grid is the one that :func:`ms_quant.numerics.affine.asymmetric_parameters` gives for
        the range, made to include 0: s its scale, z its zero point. In steps, t = x / s, a value
        becomes k = clip(round(t), smallest code - z, largest code - z) and is off by s * r,
        r = t - k; beyond the levels that is the clipping error.

        The values of a bin [a, b) count as uniform in it: c / w of them in each unit of x. An
        antiderivative of r^2 over t is F(t) = k / 12 + r^3 / 3: its derivative is r^2 while k stays
        the same, beyond the levels, too, and it has no jump where k grows by 1, as r falls from
        1/2 to -1/2 there, and r^3 / 3 by 1/12. Hence, with dx = s * dt,

            error^2 = sum over bins of c * s^3 / w * (F(t(b)) - F(t(a)))

        A value's distance to the nearest level changes by no more than the value is moved, and
        moves from anywhere in a bin to uniform places in it have a mean square of at most w^2 / 3.
        So error / sqrt(total) is within w / sqrt(3) of the truth.

        Args:
            low, high: the range, finite, low <= high.
            bits: 8 or 4.

        Raises:
            MsQuantError: no value was counted, the range is none, or ``bits`` is another number.
        """
        self._refuse_empty()
        _check_bits(bits)
        if not -math.inf < low <= high < math.inf:
            raise BadArgumentError(
                f"range: {low} to {high}, expected finite ends in ascending order"
            )
        return math.sqrt(self._squared_errors(np.array([low]), np.array([high]), bits)[0])

    def _squared_errors(self, lows: np.ndarray, highs: np.ndarray, bits: int) -> np.ndarray:
        """The square of :meth:`quantization_error` for ranges (R,), float64 (R,)."""
        smallest, largest = LIMITS[bits]
        scale, zero_point = asymmetric_parameters(lows, highs, bits)
        scale = scale.astype(np.float64)
        zero_point = zero_point.astype(np.float64)
        steps = self.edges / scale[:, None]
        levels = np.rint(steps)
        np.maximum(levels, (smallest - zero_point)[:, None], out=levels)
        np.minimum(levels, (largest - zero_point)[:, None], out=levels)
        steps -= levels
        cubes = steps * steps
        cubes *= steps
        # The sum of c * (F(t(b)) - F(t(a))) by edges. Apart, the integer levels cost no digits.
        falls = -np.diff(self.counts, prepend=0, append=0).astype(np.float64)
        thrice = cubes @ falls + 0.25 * (levels @ falls)
        return np.maximum(thrice, 0) * (scale**3 / (3 * self.width))

    def least_error_range(
        self, bits: int = 8, steps: int = QUANTILE_STEPS
    ) -> tuple[np.float32, np.float32]:
        """The range at which a greedy search for the least quantization error stops.

        It begins with the exact minimum and maximum, made to include 0. A step gives up another
        1e-5 of the values at one end, which moves that end to the far edge of the bin where its
        quantile lies, but never beyond 0. The end that moves further is taken, the upper one when
        both move alike; when neither would move, both quantiles take the step. The search stops
        before the first move that does not lower :meth:`quantization_error`. Which moves are tried
        depends on the counts alone; how many, on the error.

        Source: the histogram method of msModelSlim and of PyTorch's HistogramObserver, with the
        grid that will really be used in the error.

        Args:
            bits: 8 or 4.
            steps: a step gives up one value in so many.

        Returns:
            (low, high) float32, low <= 0 <= high, without rounding: ends are the exact minimum and
            maximum, 0, or i * w with |i| <= 2^24.

        Raises:
            MsQuantError: no value was counted, or ``bits`` is another number.
        """
        self._refuse_empty()
        _check_bits(bits)
        best = min(self.low, 0.0), max(self.high, 0.0)
        least = self._squared_errors(np.array([best[0]]), np.array([best[1]]), bits)[0]
        moves = self._moves(steps)
        while block := list(islice(moves, _BLOCK)):
            lows, highs = np.array(block).T
            for ends, error in zip(block, self._squared_errors(lows, highs, bits), strict=True):
                if error >= least:
                    return np.float32(best[0]), np.float32(best[1])
                best, least = ends, error
        return np.float32(best[0]), np.float32(best[1])

    def _moves(self, steps: int = QUANTILE_STEPS) -> Iterator[tuple[float, float]]:
        """The ranges that the search goes through, after the first."""
        lower = _End(self.counts, -self.first, steps)
        upper = _End(self.counts[::-1], self.first + self.counts.size, steps)
        while True:
            idle = min(lower.idle_steps(), upper.idle_steps())
            lower.steps += idle
            upper.steps += idle
            if lower.steps + upper.steps >= steps - 1:  # the next step would leave nothing
                return
            moved = lower if lower.gain() > upper.gain() else upper
            moved.steps += 1
            low, high = 0.0 - lower.reach() * self.width, upper.reach() * self.width
            yield max(low, min(self.low, 0.0)), min(high, max(self.high, 0.0))

    def _refuse_empty(self) -> None:
        if not self.counts.size:
            raise BadArgumentError(f"{self.name}: no values were counted, expected at least one")


def _grid(low: float, high: float, bins: int) -> tuple[int, int, int]:
    """Exponent, first bin and number of bins for a range of values."""
    exponent = SMALLEST_EXPONENT
    if largest := max(-low, high):
        exponent = max(exponent, math.frexp(largest)[1] - 24)
    while True:
        first = math.floor(low * 2.0**-exponent)
        size = math.floor(high * 2.0**-exponent) - first + 1
        if size <= bins:
            return exponent, first, size
        exponent += 1


class _End:
    """One end of the range during the search.

    Args:
        counts: of the bins, from this end inwards.
        outermost: bins between 0 and the end of the whole range, negative when 0 lies outside it.
        total: a step gives up one value in so many.

    Attributes:
        steps: how many have been taken at this end.
    """

    def __init__(self, counts: np.ndarray, outermost: int, total: int) -> None:
        self.steps = 0
        self._outermost, self._total = outermost, total
        # After so many steps the values up to each bin have been given up.
        passed = -(-np.cumsum(counts) * total // counts.sum())
        self._passed: list[int] = passed.tolist()

    def reach(self, further: int = 0) -> int:
        """Bins between 0 and this end, some steps from now."""
        return max(self._outermost - bisect_right(self._passed, self.steps + further), 0)

    def gain(self) -> int:
        """How many bins the next step moves this end."""
        return self.reach() - self.reach(1)

    def idle_steps(self) -> int:
        """How many steps from now do not move this end."""
        if not self.reach():
            return self._total
        return self._passed[bisect_right(self._passed, self.steps)] - self.steps - 1


def _check_bits(bits: int) -> None:
    if bits not in LIMITS:
        raise BadArgumentError(f"bits: {bits!r}, expected 8 or 4")
