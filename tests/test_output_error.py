"""The error of a group's outputs against loops, and what a job says of bad ones."""

from __future__ import annotations

import numpy as np
import pytest

from ms_quant.algorithms.problem import Problem, Solution, apply
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.result import GroupReport
from ms_quant.pipeline.warnings import quality_warnings
from ms_quant.quantization.output_error import output_error
from ms_quant.schemes.table import get_scheme
from ms_quant.statistics.errors import errors
from ms_quant.statistics.observers import ActivationStats


def problem(scheme: str, *, massive: float = 1.0, tokens: int = 12) -> Problem:
    """q and k behind one input of 32 channels; one value of the first token may be massive."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((tokens, 32)).astype(np.float32)
    if tokens:
        x[0, 5] *= massive
    stats = ActivationStats(32, max(1, tokens))
    stats.update(x)
    weights = {
        name: rng.standard_normal((rows, 32)).astype("f4") for name, rows in (("q", 6), ("k", 3))
    }
    biases = {"q": np.full(6, 50, np.float32)}
    dtype = DTYPES["bfloat16"]
    return Problem("qkv", get_scheme(scheme), weights, biases, stats, dtype, lambda linears: 0.0)


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16", "W8A8_MXFP8"])
@pytest.mark.parametrize("massive", [1.0, 3000.0])
def test_it_is_the_mean_over_tokens_of_all_linears_together(scheme: str, massive: float) -> None:
    """Without the bias, which quantizing does not change: it would hide the rest."""
    of = problem(scheme, massive=massive)
    linears = apply(of, Solution())
    phases = []
    for decode in (False, True) if scheme == "W8A8_MIX" else (False,):
        shares = []
        for token in of.seen.rows:
            wrong = whole = 0.0
            for name, linear in linears.items():
                bias = of.biases.get(name, np.float32(0))
                made = linear.forward(token[None], decode)[0] - bias
                exact = of.weights[name].astype("f8") @ token
                wrong += float(np.square(made - exact).sum())
                whole += float(np.square(exact).sum())
            shares.append(wrong / whole)
        phases.append(np.mean(shares))
    found = output_error(of, linears)
    assert found == pytest.approx(max(phases), rel=0.02, abs=1e-7)
    assert (found > 0.1) == (massive > 1 and scheme in ("W8A8", "W8A8_MIX"))


def test_without_tokens_there_is_none() -> None:
    of = problem("W8A16", tokens=0)
    assert output_error(of, apply(of, Solution())) is None


def test_a_token_of_zeros_counts_all_or_nothing() -> None:
    exact = np.float32([[0, 0], [3, 4]])
    assert errors(exact, exact) == (0, 0)
    assert errors(exact + np.float32([[0, 0.5], [0, 1]]), exact)[0] == pytest.approx((1 + 0.04) / 2)


def report(*found: float | None) -> list[GroupReport]:
    return [
        GroupReport(f"model.layers.{i}.down", "W8A8", "minmax", {}, 1.0, error)
        for i, error in enumerate(found)
    ]


def test_groups_beyond_the_limit_are_named_worst_first() -> None:
    assert quality_warnings(report(None, 0.1, 0.02)) == []
    (line,) = quality_warnings(report(0.2, 0.01, 0.975, None))
    assert line.startswith(
        "the outputs of 2 of 4 groups of linears are off by more than 10 % on calibration data: "
        "model.layers.2.down (98 %), model.layers.0.down (20 %); expect a bad result"
    )
    (line,) = quality_warnings(report(0.2, 0.3, 0.4, 0.5, 0.6))
    worst = ", ".join(f"model.layers.{i}.down ({10 * i + 20} %)" for i in (4, 3, 2))
    assert f"{worst} and 2 more; " in line


def test_some_of_many_tokens_are_enough() -> None:
    """They are spread over all: the first half of the text alone would not show the second."""
    of = problem("W8A16", tokens=500)
    rows = of.seen.rows[:: -(-len(of.seen.rows) // 64)]
    linears = apply(of, Solution())
    exact = np.concatenate([rows @ of.weights[name].T for name in linears], axis=-1)
    made = np.concatenate(
        [one.forward(rows) - of.biases.get(name, 0) for name, one in linears.items()], axis=-1
    )
    assert output_error(of, linears) == pytest.approx(errors(made, exact)[0], rel=0.02)
