"""What the block-by-block driver keeps for searches."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mindspore")

from ms_quant.calibration import SearchWindows


@pytest.mark.parametrize(
    ("count", "length", "tokens", "chosen"),
    [
        (8, 256, 1024, [0, 2, 4, 6]),
        (7, 256, 1024, [0, 1, 3, 5]),
        (3, 256, 2048, [0, 1, 2]),
        (5, 1500, 2048, [0]),
        (4, 4096, 2048, [0]),  # one window at least
    ],
)
def test_searched_windows_are_spread_over_all(count, length, tokens, chosen):
    rng = np.random.default_rng(0)
    states = rng.standard_normal((3, count, length, 2)).astype("f4")
    for batch in (1, 3, count):
        searched = SearchWindows((count, length, 2), tokens)
        for start in range(0, count, batch):
            searched.add(start, *states[:, start : start + batch])
        assert list(searched.chosen) == chosen
        found = np.concatenate(list(searched.batches()), axis=1)
        assert np.array_equal(found, states[:, chosen])
