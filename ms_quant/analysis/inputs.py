"""How the inputs of groups are spread: massive channels and tokens, and msModelSlim's measures.

A massive activation is a value far above all others, of few channels and few tokens, often the
first of a window (Sun et al., "Massive Activations in Large Language Models", arXiv 2402.17762).
With one static scale for a tensor it decides how coarse all other values are rounded.
"""

from __future__ import annotations

import numpy as np

from ms_quant.analysis.records import InputFacts
from ms_quant.statistics.kept import spread
from ms_quant.statistics.observers import ActivationStats

MASSIVE = 20  # times the median: int8 has 6 steps left for the median channel or token
NAMED, SHOWN = 8, 4
MOMENT_TOKENS = 2048  # whose moments are summed up, in whole windows spread over all
QUARTILE_VALUES = 1 << 16


class InputWatch:
    """Is shown all inputs of a group, batch by batch.

    Args:
        windows: how many windows there will be.
        length: tokens of a window.
        routed: whether only some tokens come; then windows are not told apart.
    """

    def __init__(self, windows: int, length: int, routed: bool = False):
        self.length, self.routed, self.seen = length, routed, 0
        chosen = spread(windows, min(windows, max(1, MOMENT_TOKENS // length)))
        self._looks_at = np.zeros(windows * length, bool)
        self._looks_at.reshape(windows, length)[chosen] = True
        self._peaks: list[np.ndarray] = []
        self._powers = np.zeros(5)
        self._values: list[np.ndarray] = []
        self._share = len(chosen) * length

    def look(self, rows: np.ndarray) -> None:
        """Takes float32 (tokens, channels)."""
        self._peaks.append(np.maximum(rows.max(axis=1), -rows.min(axis=1)))
        looked = rows[self._looks_at[self.seen : self.seen + len(rows)]]
        self.seen += len(rows)
        if looked.size:
            wide = looked.astype(np.float64).reshape(-1)
            squares = wide * wide
            sums = wide.sum(), squares.sum(), squares @ wide, squares @ squares
            self._powers += (wide.size, *sums)
            step = max(1, self._share * looked.shape[1] // QUARTILE_VALUES)
            self._values.append(looked.reshape(-1)[::step].copy())

    def facts(self, stats: ActivationStats) -> InputFacts:
        """What was seen, with the statistics of the same input."""
        channels, tokens = stats.absmax, np.concatenate(self._peaks)
        largest, by_channel = float(channels.max()), float(np.median(channels))
        by_token = float(np.median(tokens))
        named = np.flatnonzero(channels >= max(largest / 2, MASSIVE * by_channel))
        named = named[np.argsort(-channels[named], kind="stable")]
        massive = np.flatnonzero(tokens >= max(largest / 2, MASSIVE * by_token))
        if largest == 0:
            named = massive = named[:0]
        positions = np.unique(massive % self.length)
        std, quantile, kurtosis = self._spread(largest)
        return InputFacts(
            largest,
            by_channel,
            by_token,
            tuple(named[:NAMED].tolist()),
            () if self.routed else tuple(positions[:NAMED].tolist()),
            len(massive),
            self.seen,
            std,
            quantile,
            kurtosis,
        )

    def _spread(self, absmax: float) -> tuple[float, float, float]:
        """msModelSlim's measures: std, quantile, kurtosis."""
        count, *sums = self._powers
        if not count or not absmax:
            return 0.0, 0.0, 0.0
        mean, square, cube, fourth = (total / count for total in sums)
        variance = max(float(square - mean**2), float(np.finfo(np.float64).tiny))
        central = fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4
        low, high = np.quantile(np.concatenate(self._values), (0.25, 0.75))
        between = max(float(high - low), float(np.finfo(np.float32).tiny))
        return absmax / variance**0.5, absmax / 127 / between, float(central / variance**2 - 3)


def describe_input(facts: InputFacts) -> str:
    """ "3,275 at channels 1229, 1487, first token; median 1.6"."""
    places = []
    if facts.channels:
        some = "channel" if len(facts.channels) == 1 else "channels"
        places.append(f"{some} {', '.join(map(str, facts.channels))}")
    if facts.massive_tokens:
        places.append(_tokens(facts))
    median = facts.token_median if facts.massive_tokens else facts.channel_median
    return f"{facts.absmax:,.4g} at {', '.join(places)}; median {median:,.2g}"


def _tokens(facts: InputFacts) -> str:
    if facts.positions == (0,):
        return "first token"
    count = f"{facts.massive_tokens} of {facts.tokens} tokens"
    if not facts.positions:
        return count
    shown, more = facts.positions[:SHOWN], ", ..." if len(facts.positions) > SHOWN else ""
    return f"{count} (positions {', '.join(map(str, shown))}{more})"
