"""What the block-by-block driver keeps for searches."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mindspore")

from ms_quant.calibration import SearchWindows, _damage


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


def test_a_token_with_huge_activations_counts_as_any_other() -> None:
    """Its squared output is larger than that of all others together; the damage is a share."""
    rng = np.random.default_rng(0)
    output = rng.normal(size=(2, 16, 64))
    error = 0.1 * rng.normal(size=output.shape)
    before = _damage(lambda candidate: iter([(error, output)]), {})
    assert before == pytest.approx(0.01, rel=0.1)
    output[0, 3], error[0, 3] = 1e4 * output[0, 3], 1e4 * error[0, 3]
    batches = [(error[:1], output[:1]), (error[1:], output[1:])]
    assert _damage(lambda candidate: iter(batches), {}) == pytest.approx(before)
    assert np.isfinite(_damage(lambda candidate: iter([(0 * error, 0 * output)]), {}))
