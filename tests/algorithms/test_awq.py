"""AWQ's formula against loops, and its search against every candidate as it would be deployed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import usual

from ms_quant.algorithms import get_algorithms
from ms_quant.algorithms.awq import AwqOptions, scale, solve, weight_share
from ms_quant.algorithms.clip import search_clip
from ms_quant.algorithms.problem import Problem, Solution, apply, checked, seen_inputs
from ms_quant.numerics.storage import DTYPES
from ms_quant.statistics.observers import ActivationStats

K = 64
NAMES = ("q_proj", "k_proj", "v_proj")


def slow_share(weights, group: int) -> list[float]:
    """Each column's mean over the rows of all linears of |w| / the largest |w| of its group."""
    rows = [[abs(float(value)) for value in row] for weight in weights for row in weight]
    shares = [0.0] * len(rows[0])
    for row in rows:
        for start in range(0, len(row), group or len(row)):
            part = row[start : start + (group or len(row))]
            for k, value in enumerate(part):
                shares[start + k] += value / (max(part) or 1.0) / len(rows)
    return shares


def slow_scale(mean_abs, share, exponent: float, duo: bool) -> list[float]:
    found = []
    for x, w in zip(mean_abs, share, strict=True):
        value = float(x) ** exponent
        if duo:
            value /= float(w) ** (1 - exponent) + 1e-4
        found.append(max(value, 1e-4))
    middle = math.sqrt(max(found) * min(found))
    return [value / middle for value in found]


@pytest.mark.parametrize("group", [0, 16, 32, K])
def test_share_of_a_column_in_its_groups(group):
    rng = np.random.default_rng(group)
    weights = {name: rng.standard_normal((n, K)).astype("f4") for n, name in enumerate("abc", 1)}
    weights["b"][0] = 0
    weights["c"][1, :16] = 0
    found = weight_share(weights, group)
    assert found.dtype == np.float32
    # one division in float32, a mean in float64 and one rounding
    np.testing.assert_allclose(found, slow_share(weights.values(), group), rtol=2.0**-22)


def test_share_by_hand():
    weights = {"a": np.float32([[1, -2, 8, 4]]), "b": np.float32([[0, 4, -1, 0]])}
    assert weight_share(weights, 2).tolist() == [0.25, 1.0, 1.0, 0.25]
    assert weight_share(weights, 0).tolist() == [0.0625, 0.625, 0.625, 0.25]


@given(
    pairs=st.lists(
        st.tuples(st.floats(0, 1e6, width=32), st.floats(0, 1, width=32)), min_size=1, max_size=20
    ),
    exponent=st.floats(0, 1),
    duo=st.booleans(),
)
@settings(deadline=None)
def test_scale_is_the_formula(pairs, exponent, duo):
    mean_abs, share = (np.array(column, np.float32) for column in zip(*pairs, strict=True))
    found = scale(mean_abs, share, exponent, duo)
    assert found.dtype == np.float32
    assert (found > 0).all() and np.isfinite(found).all()
    expected = slow_scale(mean_abs, share, exponent, duo)
    np.testing.assert_allclose(found, expected, rtol=2.0**-23)
    # the largest and the smallest are as far from 1
    assert float(found.max()) * float(found.min()) == pytest.approx(1, rel=2.0**-22)


def make_problem(
    scheme: str = "W4A16", *, outlier: float = 30, seed: int = 0, **more
) -> tuple[Problem, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((48, K)).astype(np.float32)
    x[:, [3, 40]] *= outlier
    stats = ActivationStats(K, len(x), with_hessian=True)
    stats.update(x)
    weights = {name: rng.standard_normal((8, K)).astype(np.float32) for name in NAMES}
    weights["v_proj"][:, 7] *= 5

    def output_error(candidate) -> float:
        assert set(candidate) == set(NAMES)
        return sum(
            float(np.square(linear.forward(x) - x @ weights[name].T).mean(dtype=np.float64))
            for name, linear in candidate.items()
        )

    if scheme == "W4A16":
        more.setdefault("group_size", 32)  # its own 128 does not divide K
    chosen, scales = usual(scheme, **more)
    problem = Problem(
        "qkv",
        chosen,
        weights,
        {},
        stats,
        DTYPES["bfloat16"],
        output_error,
        scale_type=scales,
        scores=frozenset({"q_proj", "k_proj"}),
    )
    return problem, x


def deployed_loss(problem: Problem, smooth: np.ndarray | None) -> float:
    """The loss with a vector, by hand: columns multiplied, rounded, and the input divided."""
    total, x = 0.0, problem.seen.rows
    dtype = problem.scale_dtype
    vector = np.ones(K, np.float32) if smooth is None else smooth
    for weight in problem.weights.values():
        grid = problem.scheme.weight.fit(weight * vector, "w", dtype)
        seen = problem.scheme.activation.fit(None, None).fake(x / vector)
        found = seen @ grid.values(grid.round(weight * vector)).T
        total += float(np.square(found - x @ weight.T).mean(dtype=np.float64))
    return total


@pytest.mark.parametrize("duo", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("scheme", "more"),
    [
        ("W4A16", {"group_size": 32}),
        ("W4A16", {"group_size": 0, "symmetric": False}),
        ("W8A8_DYNAMIC", {}),
        ("W4A8_DYNAMIC", {"group_size": 32}),
    ],
    ids=str,
)
def test_the_exponent_is_that_of_brute_force(scheme, more, seed, duo):
    problem, x = make_problem(scheme, seed=seed, **more)
    group = problem.scheme.weight.group_size
    mean_abs = np.abs(x).mean(axis=0, dtype=np.float64)
    share = slow_share(problem.weights.values(), group)
    vectors = [
        np.float32(slow_scale(np.float32(mean_abs), np.float32(share), step / 10, duo))
        for step in range(10)
    ]
    losses = [deployed_loss(problem, vector) for vector in [None, *vectors]]
    best = int(np.argmin(losses))
    found = solve(problem, Solution(), AwqOptions(10, duo, clip=False))
    assert found.note["loss"] == pytest.approx(losses[best], rel=1e-4)
    near = [i for i, loss in enumerate(losses) if loss <= losses[best] * 1.001]
    if found.smooth is None:
        assert 0 in near and "exponent" not in found.note
    else:
        step = round(found.note["exponent"] * 10)
        assert step + 1 in near
        np.testing.assert_allclose(found.smooth, vectors[step], rtol=2.0**-20)
    assert not found.clip
    assert losses[best] < losses[0], "nothing is gained: the outliers no longer matter"


def test_no_scaling_is_a_candidate():
    """With a loss that dislikes every vector there is none."""
    problem, _ = make_problem()
    seen = []

    def loss(candidate) -> float:
        seen.append(next(iter(candidate.values())).smooth)
        return 0.0 if seen[-1] is None else 1.0

    found = solve(replace(problem, mse=loss), Solution(), AwqOptions(clip=False))
    assert found.smooth is None and found.note == {"loss": 0.0}
    assert len(seen) == 21 and sum(s is None for s in seen) == 1
    assert len({s.tobytes() for s in seen if s is not None}) == 20


def test_a_tie_goes_to_the_smaller_exponent():
    problem, _ = make_problem()

    def loss(candidate) -> float:
        return float(next(iter(candidate.values())).smooth is None)

    found = solve(replace(problem, mse=loss), Solution(), AwqOptions())
    assert found.note["exponent"] == 0.0


def test_nothing_is_scaled_where_there_is_no_place():
    problem, _ = make_problem()
    calls = []

    def loss(candidate) -> float:
        calls.append(candidate)
        return 1.0

    found = solve(replace(problem, smoothing=False, mse=loss), Solution(), AwqOptions())
    assert found.smooth is None and len(calls) == 1
    assert set(found.clip) == {"v_proj"}


@pytest.mark.parametrize("group", [0, 32])
def test_ranges_are_searched_for_the_chosen_vector_but_not_those_of_q_and_k(group):
    problem, _ = make_problem(group_size=group)
    plain = solve(problem, Solution(), AwqOptions(clip=False))
    found = solve(problem, Solution(), AwqOptions())
    np.testing.assert_array_equal(found.smooth, plain.smooth)
    assert set(found.clip) == {"v_proj"}
    format, dtype = problem.scheme.weight, problem.dtype
    expected = search_clip(
        checked(problem, plain)["v_proj"],
        seen_inputs(problem, plain),
        lambda weight, ratio: format.fit(weight, "w", dtype, ratio),
    )
    np.testing.assert_array_equal(found.clip["v_proj"], expected)
    assert expected.min() < 1
    linears = apply(problem, found)
    for name in ("q_proj", "k_proj"):
        grid = format.fit(checked(problem, plain)[name], "w", dtype)
        np.testing.assert_array_equal(linears[name].grid.scale, grid.scale)


def test_heads_that_read_one_value_head_share_their_scale():
    """Two sets of 8 inputs are 4 heads of one value head; there are two of these."""
    heads, size = 4, 8
    problem, x = make_problem()
    problem = replace(problem, shared=(heads, size))
    found = solve(problem, Solution(), AwqOptions())
    assert found.smooth is not None
    sets = found.smooth.reshape(-1, heads, size)
    np.testing.assert_array_equal(sets, np.repeat(sets[:, :1], heads, axis=1))
    mean_abs = np.abs(x).mean(axis=0).reshape(-1, heads, size).max(axis=1)
    share = np.reshape(slow_share(problem.weights.values(), 32), (-1, heads, size)).max(axis=1)
    wide = [np.repeat(v[:, None], heads, axis=1).reshape(-1) for v in (mean_abs, share)]
    expected = slow_scale(*wide, found.note["exponent"], True)
    np.testing.assert_allclose(found.smooth, expected, rtol=2.0**-20)


@pytest.mark.parametrize("shared", [(1, 1), (1, 16), (2, 8), (4, 16)])
def test_share_takes_the_largest_of_its_sets(shared):
    heads, size = shared
    problem, _ = make_problem()
    values = np.random.default_rng(1).random(K)
    found = replace(problem, shared=shared).share(values)
    for k in range(K):
        first = k // (heads * size) * heads * size
        others = [first + h * size + k % size for h in range(heads)]
        assert found[k] == max(values[j] for j in others)


def test_rounding_after_it_sees_the_scaled_weights():
    problem, _ = make_problem()
    errors = []
    for algorithm in ("minmax", "awq", "awq+gptq"):
        solution = get_algorithms(algorithm, problem.scheme, {}).solve(problem)
        errors.append(problem.mse(apply(problem, solution)))
    assert errors[0] > errors[1] > errors[2]
