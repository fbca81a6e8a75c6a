"""The range of the tokens that searches do not look at, against a loop over windows."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ms_quant.statistics.unsearched import UnsearchedRange


@given(
    searched=st.lists(st.booleans(), min_size=1, max_size=9),
    tokens=st.integers(1, 5),
    channels=st.integers(1, 4),
    cut=st.integers(0, 9),
)
def test_it_is_that_of_the_other_windows(searched, tokens, channels, cut) -> None:
    rng = np.random.default_rng(0)
    windows = rng.standard_normal((len(searched), tokens, channels)).astype(np.float32)
    parts = UnsearchedRange(channels), UnsearchedRange(channels)
    cut = min(cut, len(searched))
    for part, place in zip(parts, (slice(0, cut), slice(cut, None)), strict=True):
        part.add(windows[place].reshape(-1, channels), np.array(searched[place], bool))
    parts[0].merge(parts[1])
    found = UnsearchedRange.restore(parts[0].arrays()).range
    others = [window for window, looked in zip(windows, searched, strict=True) if not looked]
    if not others:
        assert found is None
        return
    assert found is not None
    for channel in range(channels):
        values = [float(token[channel]) for window in others for token in window]
        assert (found[0][channel], found[1][channel]) == (min(values), max(values))


def test_without_windows_there_is_none() -> None:
    found = UnsearchedRange(3)
    found.add(np.empty((0, 3), np.float32), np.empty(0, bool))
    assert found.range is None
