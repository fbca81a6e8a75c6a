"""The divergence of predictions and relative errors, beside slow oracles."""

from __future__ import annotations

import numpy as np
import pytest

from ms_quant.analysis.divergence import divergences
from ms_quant.statistics.errors import errors


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def slow(head: np.ndarray, exact: np.ndarray, changed: np.ndarray) -> np.ndarray:
    found = np.zeros(changed.shape[:2])
    for k, variant in enumerate(changed):
        for t, row in enumerate(variant):
            p, q = log_softmax(head @ exact[t]), log_softmax(head @ row)
            found[k, t] = (np.exp(p) * (p - q)).sum()
    return found


@pytest.mark.parametrize("spread", [0.01, 1, 30])
@pytest.mark.parametrize("pieces", [1, 7, 40])
def test_it_is_that_of_the_definition(spread: float, pieces: int) -> None:
    rng = np.random.default_rng(0)
    head = rng.standard_normal((40, 8)).astype(np.float32)
    exact = spread * rng.standard_normal((5, 8)).astype(np.float32)
    changed = exact + 0.1 * rng.standard_normal((3, 5, 8)).astype(np.float32)
    step = -(-40 // pieces)
    chunks = [(start, head[start : start + step]) for start in range(0, 40, step)]
    found = divergences(chunks, exact, changed, logit_bytes=8 * 5 * 6)  # 6 words at a time
    # Logits are float32: each is off by 2^-24 of the sum of its 8 products, here at most 300.
    assert np.allclose(found, slow(head, exact, changed), rtol=1e-4, atol=4 * 300 * 2**-24)


def test_equal_predictions_do_not_diverge() -> None:
    rng = np.random.default_rng(1)
    head, exact = rng.standard_normal((30, 8)), rng.standard_normal((4, 8))
    exact = exact.astype(np.float32)
    found = divergences([(0, head.astype(np.float32))], exact, exact[None])
    assert (found >= 0).all() and found.max() < 1e-12


def test_errors_are_relative_to_each_token() -> None:
    exact = np.array([[3.0, 4.0], [1000.0, 0.0], [0.0, 0.0], [0.0, 0.0]], np.float32)
    made = exact + np.array([[0.0, 5.0], [0.0, 10.0], [0.0, 0.0], [0.0, 2.0]], np.float32)
    relative, mean = errors(made, exact)
    assert relative == pytest.approx((1 + 1e-4 + 0 + 1) / 4)
    assert mean == pytest.approx((25 + 100 + 0 + 4) / 8)
    assert errors(exact[:0], exact[:0]) == (0, 0)
