"""Running statistics of activations: one pass, whatever the sizes of the batches.

Those of several parts of the data are merged, and written as arrays and facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ms_quant import kernels
from ms_quant.numerics.affine import check_finite
from ms_quant.statistics.histogram import Histogram

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

    Attributes:
        low, high: float32 (K,), smallest and largest value of each channel.
        sum_squares, sum_abs: float64 (K,).
        products: float32 (K, K), the sum of x x^T over the tokens, or None. Only the lower
            triangle is defined.
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
    low: np.ndarray = field(init=False)
    high: np.ndarray = field(init=False)
    sum_squares: np.ndarray = field(init=False)
    sum_abs: np.ndarray = field(init=False)
    products: np.ndarray | None = field(init=False, default=None)
    histogram: Histogram | None = field(init=False, default=None)
    tokens: int = 0
    _rows: list[np.ndarray] = field(default_factory=list, repr=False)
    _stride: int = field(default=1, repr=False)

    def __post_init__(self) -> None:
        self.low = np.full(self.channels, np.inf, np.float32)
        self.high = np.full(self.channels, -np.inf, np.float32)
        self.sum_squares = np.zeros(self.channels, np.float64)
        self.sum_abs = np.zeros(self.channels, np.float64)
        if self.total_tokens is not None:
            self._stride = max(1, -(-self.total_tokens // self.keep_rows))
        if self.with_hessian:
            self.products = np.zeros((self.channels, self.channels), np.float32)
        if self.with_histogram:
            self.histogram = Histogram(name=self.name)

    def update(self, x: np.ndarray) -> None:
        """Adds a batch of tokens, (..., K) float32.

        Raises:
            MsQuantError: a value is NaN or inf.
        """
        rows = x.reshape(-1, self.channels)
        if not len(rows):
            return
        self._add_columns(rows)
        if self.products is not None:
            self._add_products(self.products, rows)
        if self.histogram is not None:
            self.histogram.update(rows)
        first = -(self.start + self.tokens) % self._stride
        self._rows.append(rows[first :: self._stride].copy())
        self.tokens += len(rows)
        self._thin()

    def _thin(self) -> None:
        """Keeps every second row, as often as there are too many of an unknown number."""
        while self.total_tokens is None and sum(map(len, self._rows)) > self.keep_rows:
            self._rows, self._stride = [np.concatenate(self._rows)[::2]], 2 * self._stride

    def merge(self, other: ActivationStats) -> None:
        """Adds what another part of the data has shown, the part after this one."""
        np.minimum(self.low, other.low, out=self.low)
        np.maximum(self.high, other.high, out=self.high)
        self.sum_squares += other.sum_squares
        self.sum_abs += other.sum_abs
        if self.products is not None and other.products is not None:
            self.products += other.products
        if self.histogram is not None and other.histogram is not None:
            self.histogram.merge(other.histogram)
        while self._stride < other._stride:
            self._rows, self._stride = [self.rows[::2]], 2 * self._stride
        self._rows.append(other.rows[:: self._stride // other._stride])
        self.tokens += other.tokens
        self._thin()

    def arrays(self) -> dict[str, np.ndarray]:
        """What was seen; :meth:`facts` says the rest."""
        found = {
            "low": self.low,
            "high": self.high,
            "sum_squares": self.sum_squares,
            "sum_abs": self.sum_abs,
            "rows": self.rows,
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
        return {**found, "stride": self._stride, "histogram": histogram}

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> ActivationStats:
        """The statistics that were written as :meth:`arrays` and :meth:`facts`."""
        names = ("channels", "total_tokens", "keep_rows", "name", "start")
        made = cls(**{name: facts[name] for name in names})
        made.low, made.high = arrays["low"], arrays["high"]
        made.sum_squares, made.sum_abs = arrays["sum_squares"], arrays["sum_abs"]
        made.products, made.tokens = arrays.get("products"), facts["tokens"]
        made._rows, made._stride = [arrays["rows"]], facts["stride"]
        if facts["histogram"] is not None:
            made.histogram = Histogram.restore(arrays["counts"], facts["histogram"])
        return made

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
        """float32 (K, K), the mean of x x^T over the tokens: half the Hessian of a linear's
        squared output error with respect to a row of its weight."""
        assert self.products is not None
        mean = np.tril(self.products) / np.float32(max(1, self.tokens))
        return mean + np.tril(mean, -1).T

    @property
    def rows(self) -> np.ndarray:
        """float32 (<= keep_rows, K), the kept tokens."""
        return np.concatenate(self._rows) if self._rows else np.zeros((0, self.channels), "f4")


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
    _row_steps: list[int] = field(default_factory=list, repr=False)

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
        self.update(rows)
        self.step_low[step] = np.minimum(self.step_low[step], rows.min(axis=0))
        self.step_high[step] = np.maximum(self.step_high[step], rows.max(axis=0))
        self._row_steps += [step] * len(self._rows[-1])

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
        return np.array(self._row_steps, np.int64)


class CacheRange:
    """The ranges of keys and values that would be cached.

    Args:
        name: what errors call the attention.
        paths: of the linears that make the keys and the values.

    Attributes:
        absmax: float32 (kv heads * head_dim,), largest magnitude of each channel of keys and
            values by the linears that make them.
    """

    def __init__(self, name: str, paths: tuple[str, ...]):
        self.name, self.paths = name, paths
        self.absmax: dict[str, np.ndarray] = {}

    def __call__(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Looks at (B, heads, S, D) keys and values, and gives them back.

        Raises:
            MsQuantError: a value is NaN or inf.
        """
        for path, x in zip(self.paths, (keys, values), strict=True):
            check_finite(x, f"{self.name}{path}: calibration output")
            absmax = np.abs(x).max(axis=(0, 2), initial=0).reshape(-1)
            self.absmax[path] = np.maximum(self.absmax.get(path, 0), absmax)
        return keys, values
