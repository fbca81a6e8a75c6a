"""Running statistics of activations: one pass, whatever the sizes of the batches.

Those of several parts of the data are merged, and written as arrays and facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ms_quant import kernels
from ms_quant.errors import BadFileError
from ms_quant.models.block_spec import CacheSpec
from ms_quant.numerics.affine import check_finite
from ms_quant.statistics.histogram import Histogram
from ms_quant.statistics.kept import KeptRows
from ms_quant.statistics.recall_window import head_maxima
from ms_quant.statistics.stated import array, fact

if TYPE_CHECKING:
    from typing import Self

KEPT_TOKENS = 512


@dataclass
class ActivationStats:
    """Statistics of the inputs of one linear.

    Args:
        channels: size of the last axis, K.
        total_tokens: how many tokens will be seen, by all parts together; decides which rows are
            kept. None where nobody knows, as of an expert: rows are thinned out as they come.
        keep_rows: at most this many evenly strided token rows are kept for searches.
        name: what the errors call it.
        with_hessian: sum up the products of channels, too.
        with_histogram: count the values of all channels, too.
        start: how many tokens the parts before this one see.
        equal_tokens: in the products each token counts as any other, whatever its length.

    Attributes:
        low, high: float32 (K,), smallest and largest value of each channel.
        sum_squares, sum_abs: float64 (K,).
        products: float32 (K, K), the sum of x x^T over the tokens, over its mean square with
            ``equal_tokens``, or None. Only the lower triangle is defined.
        histogram: of all values, or None.
        tokens: tokens seen so far.
    """

    channels: int
    total_tokens: int | None
    keep_rows: int = KEPT_TOKENS
    name: str = "activation"
    with_hessian: bool = False
    with_histogram: bool = False
    start: int = 0
    equal_tokens: bool = True
    low: np.ndarray = field(init=False)
    high: np.ndarray = field(init=False)
    sum_squares: np.ndarray = field(init=False)
    sum_abs: np.ndarray = field(init=False)
    products: np.ndarray | None = field(init=False, default=None)
    histogram: Histogram | None = field(init=False, default=None)
    tokens: int = 0
    _kept: KeptRows = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.low = np.full(self.channels, np.inf, np.float32)
        self.high = np.full(self.channels, -np.inf, np.float32)
        self.sum_squares = np.zeros(self.channels, np.float64)
        self.sum_abs = np.zeros(self.channels, np.float64)
        self._kept = KeptRows(self.channels, self.total_tokens, self.keep_rows, self.start)
        if self.with_hessian:
            self.products = np.zeros((self.channels, self.channels), np.float32)
        if self.with_histogram:
            self.histogram = Histogram(name=self.name)

    def update(self, x: np.ndarray) -> None:
        """Adds a batch of tokens, (..., K) float32.

        Raises:
            MsQuantError: a value is NaN or inf.
        """
        self._update(x.reshape(-1, self.channels))

    def _update(self, rows: np.ndarray, label: int = 0) -> None:
        if not len(rows):
            return
        self._add_columns(rows)
        if self.products is not None:
            self._add_products(self.products, rows)
        if self.histogram is not None:
            self.histogram.update(rows)
        self._kept.add(rows, self.tokens, label)
        self.tokens += len(rows)

    def merge(self, other: Self) -> None:
        """Adds what another part of the data has shown, the part after this one."""
        np.minimum(self.low, other.low, out=self.low)
        np.maximum(self.high, other.high, out=self.high)
        self.sum_squares += other.sum_squares
        self.sum_abs += other.sum_abs
        if self.products is not None and other.products is not None:
            self.products += other.products
        if self.histogram is not None and other.histogram is not None:
            self.histogram.merge(other.histogram)
        self._kept.merge(other._kept)
        self.tokens += other.tokens

    def followed_by(self, other: Self) -> Self:
        """The statistics of two parts together, each of which took its own tokens for all.

        All but sums and kept rows is as one pass would have it, bit for bit. Sums are added in
        another order: either way the one of n terms is within n * u of the sum of their
        magnitudes, u = 2^-53 (float64), of products 2^-24. For each row that one pass would have
        kept there is the same where a part has it, else the nearest.
        """
        assert self.total_tokens is not None and other.total_tokens is not None
        total = self.total_tokens + other.total_tokens
        first, second = deepcopy(self), copy(other)
        first.total_tokens, first._kept = total, self._kept.moved(self.tokens, total, 0)
        second._kept = other._kept.moved(other.tokens, total, self.tokens)
        first.merge(second)
        return first

    def within(self, low: np.ndarray, high: np.ndarray) -> Self:
        """The same with another range of each channel, float32 (K,)."""
        other = copy(self)
        other.low, other.high = low, high
        return other

    def rename(self, name: str) -> None:
        """Changes what errors call it."""
        self.name = name
        if self.histogram is not None:
            self.histogram.name = name

    def arrays(self) -> dict[str, np.ndarray]:
        """What was seen; :meth:`facts` says the rest."""
        found = {
            "low": self.low,
            "high": self.high,
            "sum_squares": self.sum_squares,
            "sum_abs": self.sum_abs,
            "rows": self._kept.rows,
            "row_places": self._kept.places,
        }
        if self.products is not None:
            found["products"] = self.products
        if self.histogram is not None:
            found["counts"] = self.histogram.counts
        return found

    def facts(self) -> dict[str, Any]:
        """How it was seen, as JSON."""
        names = ("channels", "total_tokens", "keep_rows", "name", "start", "tokens")
        histogram = None if self.histogram is None else self.histogram.facts()
        found = {name: getattr(self, name) for name in names}
        return {**found, "stride": self._kept.stride, "histogram": histogram}

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Self:
        """The statistics that were written as :meth:`arrays` and :meth:`facts`.

        Raises:
            MsQuantError: one of them is missing or is not what it should be.
        """
        channels = fact(facts, "channels", int, 1)
        array(arrays, "low", np.float32, (channels,), finite=False)  # so many are there
        total = fact(facts, "total_tokens")
        if total is not None:
            total = fact(facts, "total_tokens", int)
        made = cls(channels, total, **cls._arguments(arrays, facts))
        made.tokens = fact(facts, "tokens", int)
        made._take(arrays, facts)
        return made

    @classmethod
    def _arguments(
        cls, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {
            "keep_rows": fact(facts, "keep_rows", int, 1),
            "name": fact(facts, "name", str),
            "start": fact(facts, "start", int),
        }

    def _take(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        ends, size = bool(self.tokens), (self.channels,)
        self.low = array(arrays, "low", np.float32, size, finite=ends)
        self.high = array(arrays, "high", np.float32, size, finite=ends)
        if ends and (self.low > self.high).any():
            raise BadFileError("low: is above high, expected at most that")
        self.sum_squares = array(arrays, "sum_squares", np.float64, size)
        self.sum_abs = array(arrays, "sum_abs", np.float64, size)
        if "products" in arrays:
            square = (self.channels, self.channels)
            self.products = array(arrays, "products", np.float32, square)
        if fact(facts, "histogram") is not None:
            counts = array(arrays, "counts", np.int64, (None,), below=self.tokens * size[0] + 1)
            self.histogram = Histogram.restore(counts, fact(facts, "histogram", dict))
            if self.histogram.total != self.tokens * self.channels:
                raise BadFileError(
                    f"counts: are of {self.histogram.total} values, expected those of "
                    f"{self.tokens} tokens"
                )
        rows = array(arrays, "rows", np.float32, (None, self.channels))
        end = self.start + self.tokens
        places = array(arrays, "row_places", np.int64, (len(rows),), below=end)
        if (np.diff(places) <= 0).any():
            raise BadFileError("row_places: do not ascend, expected each place once, in order")
        self._kept.stride = fact(facts, "stride", int, 1)
        if self.tokens > 4 * self._kept.stride * (len(rows) + 1):  # merging goes over all places
            raise BadFileError(
                f"tokens: is {self.tokens}, expected fewer for {len(rows)} kept rows"
            )
        self._kept.put(rows, places, self._labels(arrays, len(rows)))

    def _labels(self, arrays: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        return np.zeros(count, np.int64)

    def _add_columns(self, rows: np.ndarray) -> None:
        sums = self.low, self.high, self.sum_squares, self.sum_abs
        if kernels.available() and kernels.column_stats(rows, *sums):
            return
        check_finite(rows, self.name)
        np.minimum(self.low, rows.min(axis=0), out=self.low)
        np.maximum(self.high, rows.max(axis=0), out=self.high)
        self.sum_squares += np.einsum("tk,tk->k", rows, rows, dtype=np.float64)
        self.sum_abs += np.abs(rows).sum(axis=0, dtype=np.float64)

    def _add_products(self, products: np.ndarray, rows: np.ndarray) -> None:
        if self.equal_tokens:
            rows = of_one_length(rows)
        if not (kernels.has_product() and kernels.syrk(products, rows)):
            products += rows.T @ rows

    @property
    def ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """What static parameters are made for: ``low`` and ``high``."""
        return self.low, self.high

    @property
    def absmax(self) -> np.ndarray:
        """float32 (K,), largest magnitude of each channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    @property
    def l2_norm(self) -> np.ndarray:
        """float32 (K,), the L2 norm of each channel over all tokens seen."""
        return np.sqrt(self.sum_squares).astype(np.float32)

    @property
    def mean_abs(self) -> np.ndarray:
        """float32 (K,), the mean magnitude of each channel."""
        return (self.sum_abs / max(1, self.tokens)).astype(np.float32)

    @property
    def hessian(self) -> np.ndarray:
        """float32 (K, K), the mean of the products over the tokens: half the Hessian of a linear's
        squared output error, relative with ``equal_tokens``, by a row of its weight."""
        assert self.products is not None
        mean = np.tril(self.products) / np.float32(max(1, self.tokens))
        return mean + np.tril(mean, -1).T

    @property
    def rows(self) -> np.ndarray:
        """float32 (<= keep_rows, K), the kept tokens."""
        return self._kept.rows


@dataclass
class StepStats(ActivationStats):
    """The same over all timesteps of a diffusion model together, and the range of each.

    Args:
        steps: T.

    Attributes:
        step_low, step_high: float32 (T, K); inf and -inf where nothing was seen.
    """

    steps: int = 1
    step_low: np.ndarray = field(init=False)
    step_high: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.step_low = np.full((self.steps, self.channels), np.inf, np.float32)
        self.step_high = np.full((self.steps, self.channels), -np.inf, np.float32)

    def update_step(self, x: np.ndarray, step: int) -> None:
        """Adds a batch of tokens of one step, (..., K) float32.

        Raises:
            MsQuantError: a value is NaN or inf.
        """
        rows = x.reshape(-1, self.channels)
        if not len(rows):
            return
        self._update(rows, step)
        self.step_low[step] = np.minimum(self.step_low[step], rows.min(axis=0))
        self.step_high[step] = np.maximum(self.step_high[step], rows.max(axis=0))

    def merge(self, other: Self) -> None:
        """Adds what another part of the data has shown, the part after this one."""
        super().merge(other)
        self.steps = max(self.steps, other.steps)
        lows = _padded(self.step_low, self.steps, np.inf), other.step_low
        highs = _padded(self.step_high, self.steps, -np.inf), other.step_high
        self.step_low = np.minimum(lows[0], _padded(lows[1], self.steps, np.inf))
        self.step_high = np.maximum(highs[0], _padded(highs[1], self.steps, -np.inf))

    def arrays(self) -> dict[str, np.ndarray]:
        """See :meth:`ActivationStats.arrays`."""
        return super().arrays() | {
            "step_low": self.step_low,
            "step_high": self.step_high,
            "row_steps": self.row_steps,
        }

    def facts(self) -> dict[str, Any]:
        """See :meth:`ActivationStats.facts`."""
        return super().facts() | {"steps": self.steps}

    @classmethod
    def _arguments(
        cls, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]
    ) -> dict[str, Any]:
        steps = fact(facts, "steps", int, 1)
        array(arrays, "step_low", np.float32, (steps, None), finite=False)  # so many are there
        return super()._arguments(arrays, facts) | {"steps": steps}

    def _take(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        super()._take(arrays, facts)
        size = (self.steps, self.channels)
        self.step_low = array(arrays, "step_low", np.float32, size, finite=False)
        self.step_high = array(arrays, "step_high", np.float32, size, finite=False)

    def _labels(self, arrays: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        return array(arrays, "row_steps", np.int64, (count,), below=self.steps)

    @property
    def ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """``step_low`` and ``step_high``."""
        return self.step_low, self.step_high

    @property
    def seen_steps(self) -> set[int]:
        """The steps that have a range."""
        return set(np.flatnonzero((self.step_low <= self.step_high).all(axis=1)).tolist())

    @property
    def row_steps(self) -> np.ndarray:
        """int64 (len(rows),), the step of each kept token."""
        return self._kept.labels


def of_one_length(rows: np.ndarray) -> np.ndarray:
    """float32 (tokens, K) rows of mean square 1, those of zeros aside.

    A token with massive activations outweighs thousands of others in a sum of squares.
    """
    length = np.sqrt(np.square(rows, dtype=np.float64).mean(axis=1, keepdims=True))
    return (rows / np.where(length > 0, length, 1)).astype(np.float32)


def _padded(ranges: np.ndarray, steps: int, fill: float) -> np.ndarray:
    """The ends of more steps."""
    missing = np.full((steps - len(ranges), ranges.shape[1]), fill, np.float32)
    return np.concatenate([ranges, missing])


class CacheRange:
    """The ranges of what is in int8 with a cache, as of keys and values.

    Args:
        name: what errors call the attention.
        cached: what it is.

    Attributes:
        absmax: path to float32, the largest magnitude of each channel; or where heads have a scale
            each (2, heads) of :func:`~ms_quant.statistics.recall_window.head_maxima`.
    """

    def __init__(self, name: str, cached: Mapping[str, CacheSpec]):
        self.name, self.cached = name, cached
        self.absmax: dict[str, np.ndarray] = {}

    def add(self, path: str, x: np.ndarray) -> None:
        """Looks at (B, heads, S, D) of what a path names.

        Raises:
            MsQuantError: a value is NaN or inf.
        """
        check_finite(x, f"{self.name}{path}: calibration output")
        spec = self.cached[path]
        if spec.heads:
            absmax = head_maxima(x, spec.outside)
        else:
            absmax = np.abs(x).max(axis=(0, 2), initial=0).reshape(-1)
        self.absmax[path] = np.maximum(self.absmax.get(path, 0), absmax)
