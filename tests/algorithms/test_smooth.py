"""SmoothQuant's vector against equation 4 in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant.algorithms import get_algorithms
from ms_quant.algorithms.problem import Problem, apply
from ms_quant.algorithms.smooth import smooth_scale, weight_absmax
from ms_quant.numerics.storage import DTYPES
from ms_quant.schemes.table import get_scheme
from ms_quant.statistics.observers import ActivationStats


def slow_scale(act: float, weight: float, alpha: float) -> float:
    if act == 0 or weight == 0:
        return 1.0
    return max(act**alpha / weight ** (1 - alpha), 1e-5)


@pytest.mark.parametrize(
    ("act", "weight", "alpha", "scale"),
    [
        (16.0, 4.0, 0.5, 2.0),
        (16.0, 4.0, 1.0, 16.0),  # all of the range moves to the weights
        (16.0, 4.0, 0.0, 0.25),  # every weight column becomes 1
        (0.0, 4.0, 0.5, 1.0),  # a dead channel is left alone
        (16.0, 0.0, 0.5, 1.0),  # a dead column too
        (0.0, 0.0, 0.5, 1.0),
        (1e-30, 1.0, 1.0, 1e-5),  # bounded below
        (1.0, 1e-30, 0.0, 1e30),
    ],
)
def test_table(act, weight, alpha, scale):
    found = smooth_scale(np.float32([act]), np.float32([weight]), alpha)
    assert found.dtype == np.float32
    assert found[0] == pytest.approx(scale, rel=2.0**-22)


@given(
    pairs=st.lists(
        st.tuples(st.floats(0, 1e6, width=32), st.floats(0, 1e3, width=32)), max_size=20
    ),
    alpha=st.floats(0, 1),
)
@settings(deadline=None)
def test_is_equation_4(pairs, alpha):
    act = np.array([a for a, _ in pairs], np.float32)
    weight = np.array([w for _, w in pairs], np.float32)
    with np.errstate(over="ignore"):  # a subnormal column: beyond float32
        found = smooth_scale(act, weight, alpha)
        expected = np.array([slow_scale(*pair, alpha) for pair in pairs]).astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=2.0**-23)


def test_columns_are_shared_by_the_group():
    first, second = np.float32([[1, -5], [2, 3]]), np.float32([[-4, 1]])
    np.testing.assert_array_equal(weight_absmax([first, second]), [4, 5])
    np.testing.assert_array_equal(weight_absmax({"q": first}.values()), [2, 5])


def outlier_problem(dtype: str = "bfloat16") -> tuple[Problem, np.ndarray]:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((64, 16)).astype("f4")
    x[:, 3] *= 100
    stats = ActivationStats(16, len(x))
    stats.update(x)
    weights = {name: rng.standard_normal((8, 16)).astype("f4") for name in "qkv"}
    weights["k"] *= 3

    def no_loss(candidate):
        raise AssertionError("SmoothQuant searches nothing")

    scheme = get_scheme("W8A8")
    problem = Problem("qkv", scheme, weights, {}, stats, DTYPES[dtype], no_loss)
    return problem, x


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_solution_is_the_formula_over_the_whole_group(alpha):
    problem, x = outlier_problem()
    solution = get_algorithms("smoothquant", problem.scheme, {"alpha": alpha}).solve(problem)
    for j in range(16):
        act = max(abs(float(row[j])) for row in x)
        weight = max(abs(float(row[j])) for w in problem.weights.values() for row in w)
        assert solution.smooth[j] == pytest.approx(slow_scale(act, weight, alpha), rel=2.0**-22)
    assert solution.note == {"alpha": alpha}
    assert not solution.clip


@pytest.mark.parametrize(("only", "smoothed"), [("*", True), ("[kx]", True), ("*down_proj", False)])
def test_only_groups_with_a_linear_of_the_pattern_are_smoothed(only, smoothed):
    problem, _ = outlier_problem()
    pipeline = get_algorithms("smoothquant", problem.scheme, {"only": only})
    assert (pipeline.solve(problem).smooth is not None) == smoothed
    said = {"alpha": 0.5} if only == "*" else {"alpha": 0.5, "only": only}
    assert pipeline.chosen == {"smoothquant": said}  # records of before lack it


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_group_shares_one_stored_vector_and_outliers_cost_less(dtype):
    problem, x = outlier_problem(dtype)
    errors = {}
    for name in ("minmax", "smoothquant"):
        linears = apply(problem, get_algorithms(name, problem.scheme).solve(problem))
        assert len({id(linear.activation) for linear in linears.values()}) == 1
        stored = linears["q"].activation.input_scale
        np.testing.assert_array_equal(stored.astype(DTYPES[dtype]).astype("f4"), stored)
        errors[name] = sum(
            np.square(linear.forward(x) - x @ problem.weights[key].T).mean()
            for key, linear in linears.items()
        )
    assert errors["smoothquant"] < errors["minmax"] / 4
