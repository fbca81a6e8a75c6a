"""The search of two strengths against a plain double loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ms_quant.algorithms import get_algorithms
from ms_quant.algorithms.flex_smooth import GRID, FlexSmoothOptions, search
from ms_quant.algorithms.problem import Problem
from ms_quant.errors import MsQuantError
from ms_quant.numerics.storage import DTYPES
from ms_quant.schemes.table import get_scheme
from ms_quant.statistics.observers import ActivationStats

F32 = DTYPES["float32"]


def problem(scheme: str, seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((24, 16)) * np.exp(1.5 * rng.standard_normal(16))
    weights = {
        name: (rng.standard_normal((6, 16)) * np.exp(rng.standard_normal(16))).astype("f4")
        for name in ("a", "b")
    }
    stats = ActivationStats(16, 24)
    stats.update(x.astype("f4"))
    biases = {"a": np.full(6, 100, "f4")}

    def no_loss(candidate: Any) -> float:
        raise AssertionError("the search asks for no forward of the block")

    return Problem("ab", get_scheme(scheme), weights, biases, stats, F32, no_loss)


def slow_error(asked: Problem, alpha: float, beta: float, bits: int) -> float:
    """Per-token inputs and per-channel weights, loops and float64."""
    x, top = asked.seen.rows.astype("f8"), 2 ** (bits - 1) - 1
    columns = np.max([np.abs(w).max(axis=0) for w in asked.weights.values()], axis=0)
    smooth = np.abs(x).max(axis=0) ** alpha / columns.astype("f8") ** beta
    wrong = size = 0.0
    for weight in asked.weights.values():
        for row in weight.astype("f8"):
            moved = row * smooth
            step = np.abs(moved).max() / top
            rounded = np.rint(moved / step) * step
            for token in x:
                seen = token / smooth
                unit = np.abs(seen).max() / top
                found = (np.rint(seen / unit) * unit) @ rounded
                wrong += (found - token @ row) ** 2
                size += (token @ row) ** 2
    return wrong / size


@pytest.mark.parametrize(("scheme", "bits"), [("W8A8_DYNAMIC", 8), ("W4A4_DYNAMIC", 4)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_strengths_are_those_of_a_double_loop(scheme, bits, seed):
    asked = problem(scheme, seed=seed)
    algorithms = get_algorithms("flexsmooth", asked.scheme)
    note = algorithms.first(asked).note
    errors = {a: slow_error(asked, a, 1 - a, bits) for a in GRID}
    alpha = min(errors, key=errors.get)
    assert note["alpha"] == alpha
    later = {b: slow_error(asked, alpha, b, bits) for b in (1 - alpha, *GRID)}
    assert later[note["beta"]] == pytest.approx(min(later.values()), rel=1e-3)
    assert min(later.values()) <= min(errors.values())


def test_what_is_given_is_not_searched():
    asked = []

    def error(alpha: float, beta: float) -> float:
        asked.append((alpha, beta))
        return abs(alpha - 0.33) + abs(beta - 0.62)

    assert search(error, FlexSmoothOptions(0.2, 0.7)) == (0.2, 0.7) and not asked
    assert search(error, FlexSmoothOptions(beta=0.7)) == (0.35, 0.7)
    assert {beta for _, beta in asked} == {0.7}
    asked.clear()
    assert search(error, FlexSmoothOptions(alpha=0.2)) == (0.2, 0.6)
    assert {alpha for alpha, _ in asked} == {0.2}
    assert search(error, FlexSmoothOptions()) == (0.35, 0.6)
    assert search(lambda a, b: 0.0, FlexSmoothOptions()) == (0.0, 1.0)


def test_vectors_of_given_strengths():
    asked = problem("W8A8_DYNAMIC")
    algorithms = get_algorithms("flexsmooth", asked.scheme, {"alpha": 0.25, "beta": 0.5})
    columns = np.max([np.abs(w).max(axis=0) for w in asked.weights.values()], axis=0)
    expected = asked.seen.absmax.astype("f8") ** 0.25 / columns.astype("f8") ** 0.5
    np.testing.assert_allclose(algorithms.first(asked).smooth, expected, rtol=2.0**-20)


def test_refusals():
    for value in (-0.1, 1.1, float("nan"), "much"):
        with pytest.raises(MsQuantError, match=r"^flexsmooth\.alpha"):
            get_algorithms("flexsmooth", get_scheme("W8A8"), {"alpha": value})
    with pytest.raises(MsQuantError, match="only weights would get harder"):
        get_algorithms("flexsmooth", get_scheme("W8A16"))
