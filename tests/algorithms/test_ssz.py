"""SSZ against a loop over Python floats, and what least squares promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from plans import usual

from ms_quant.algorithms import get_algorithms
from ms_quant.algorithms.problem import Problem, Solution, apply
from ms_quant.algorithms.ssz import SszOptions, improve, solve
from ms_quant.numerics.grid import AffineFormat, AffineGrid
from ms_quant.numerics.storage import DTYPES

F32, BF16 = DTYPES["float32"], DTYPES["bfloat16"]
G, K = 32, 96
FORMATS = [AffineFormat(bits, group) for bits in (8, 4) for group in (0, G)]


def random_weight(seed: int, rows: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((rows, K)) ** 3 * 0.1).astype(np.float32)  # long tails
    if rows > 2:
        weight[1] = 0
        weight[2, :G] = 0
    return weight


def slow_codes(values: list[float], scale: float, bits: int) -> list[int]:
    largest = 2 ** (bits - 1) - 1
    steps = [float(np.float32(value) / np.float32(scale)) for value in values]
    return [min(largest, max(-largest - 1, round(step))) for step in steps]


def slow_error(values: list[float], scale: float, bits: int) -> float:
    codes = slow_codes(values, scale, bits)
    near = [float(np.float32(code) * np.float32(scale)) for code in codes]
    return sum((a - b) ** 2 for a, b in zip(near, values, strict=True))


def slow_scale(values: list[float], scale: float, bits: int, steps: int, dtype: np.dtype) -> float:
    """Codes, then the least squares scale of these codes, and again; the best that was met."""
    best, least = scale, slow_error(values, scale, bits)
    for _ in range(steps):
        codes = slow_codes(values, scale, bits)
        power = sum(code * code for code in codes)
        if power == 0:
            break
        ideal = sum(w * code for w, code in zip(values, codes, strict=True)) / power
        scale = float(np.float64(ideal).astype(dtype))
        error = slow_error(values, scale, bits)
        if error < least:
            best, least = scale, error
    return best


def errors(weight: np.ndarray, grid: AffineGrid) -> np.ndarray:
    """float64 (out, groups)."""
    wrong = grid.values(grid.round(weight)).astype(np.float64) - weight
    return np.square(wrong).reshape(*grid.scale.shape, -1).sum(axis=2)


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_is_the_slow_loop(format, dtype, steps):
    weight = random_weight(steps)
    grid = format.fit(weight, "w", dtype)
    found = improve(weight, grid, steps)
    size = format.group_size or K
    for n, g in np.ndindex(grid.scale.shape):
        values = [float(v) for v in weight[n, g * size : (g + 1) * size]]
        expected = slow_scale(values, float(grid.scale[n, g]), format.bits, steps, dtype)
        # sums in another order may end at the other side of a rounding boundary of the type
        spacing = 2.0**-7 if dtype == BF16 else 2.0**-22
        assert found.scale[n, g] == pytest.approx(expected, rel=spacing)
        near = slow_error(values, float(found.scale[n, g]), format.bits)
        assert near == pytest.approx(slow_error(values, expected, format.bits), rel=1e-5)


@given(
    format=st.sampled_from(FORMATS),
    dtype=st.sampled_from([F32, BF16]),
    clip=st.sampled_from([1.0, 0.7]),
    weight=hnp.arrays(np.float32, (2, 2 * G), elements=st.floats(-1e4, 1e4, width=32)),
)
@settings(deadline=None, max_examples=50)
def test_no_group_is_worse_than_before(format, dtype, clip, weight):
    grid = format.fit(weight, "w", dtype, clip)
    found = improve(weight, grid)
    assert (errors(weight, found) <= errors(weight, grid)).all()
    assert found.scale.dtype == np.float32
    np.testing.assert_array_equal(found.scale.astype(dtype).astype("f4"), found.scale)
    assert (found.scale > 0).all()
    assert not found.zero_point.any()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_more_steps_are_never_worse(format):
    """With codes given, the error is a parabola of the scale, so that the stored number nearest
    to its lowest point is the best stored one; and the nearest codes are the best for a scale."""
    weight = np.random.default_rng(10).standard_normal((400, K)).astype(np.float32)
    grid = format.fit(weight, "w", BF16)
    least = errors(weight, grid)
    for steps in range(1, 5):
        found = errors(weight, improve(weight, grid, steps))
        assert (found <= least).all()
        least = found


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_where_it_ends_the_scale_is_the_least_squares_one(format):
    weight = random_weight(7)
    grid = format.fit(weight, "w")
    found = improve(weight, grid, 1000)
    codes = found.round(weight).reshape(*found.scale.shape, -1).astype(np.float64)
    power = np.square(codes).sum(axis=2)
    groups = weight.reshape(codes.shape).astype(np.float64)
    live = power > 0
    ideal = (groups * codes).sum(axis=2)[live] / power[live]
    np.testing.assert_allclose(found.scale[live], ideal, rtol=2.0**-22)
    np.testing.assert_array_equal(found.scale[~live], 1)
    assert (errors(weight, found) < errors(weight, grid))[live].mean() > 0.9
    again = improve(weight, found, 1000)
    np.testing.assert_allclose(errors(weight, again), errors(weight, found), rtol=1e-6)


def test_by_hand():
    """Codes 7 and 3: the scale (7 * 7 + 3 * 2.6) / 58 is better for them than 1."""
    weight = np.float32([[7, 2.6]])
    grid = AffineFormat(4).fit(weight, "w")
    assert grid.scale.tolist() == [[1.0]]
    assert improve(weight, grid, 1).scale[0, 0] == np.float32(56.8 / 58)


def test_exact_weights_keep_their_scale():
    weight = np.float32([[7, -3, 2, 0], [0, 0, 0, 0], [-7, -7, 7, 7]])
    grid = AffineFormat(4).fit(weight, "w")
    assert improve(weight, grid).scale.tolist() == [[1.0]] * 3


@pytest.mark.parametrize("power", [-8, 8, 40])
def test_powers_of_two_do_not_matter(power):
    weight = random_weight(9)
    factor = np.float32(2.0**power)
    found, other = (improve(w, AffineFormat(4, G).fit(w, "w")) for w in (weight, weight * factor))
    live = found.scale != 1
    np.testing.assert_array_equal(other.scale[live], found.scale[live] * factor)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    weight = random_weight(1, rows)
    for format in FORMATS:
        grid = format.fit(weight, "w")
        assert improve(weight, grid).scale.shape == grid.scale.shape


def test_the_given_grid_stays():
    weight = random_weight(2)
    grid = AffineFormat(4).fit(weight, "w")
    before = grid.scale.copy()
    improve(weight, grid)
    np.testing.assert_array_equal(grid.scale, before)


def problem_of(scheme: str, **more) -> Problem:
    weights = {"q": random_weight(3), "k": random_weight(4)}
    chosen, scales = usual(scheme, **more)
    return Problem("qk", chosen, weights, {}, None, BF16, lambda c: 0.0, scale_type=scales)


@pytest.mark.parametrize(
    ("scheme", "more"), [("W4A16", {"group_size": 32}), ("W8A8_DYNAMIC", {})], ids=str
)
def test_solution_is_a_grid_for_each_linear(scheme, more):
    problem = problem_of(scheme, **more)
    solution = get_algorithms("ssz", problem.scheme, {"steps": 5}).solve(problem)
    linears = apply(problem, solution)
    for name, weight in problem.weights.items():
        grid = problem.scheme.weight.fit(weight, name, problem.scale_dtype)
        np.testing.assert_array_equal(linears[name].grid.scale, improve(weight, grid, 5).scale)
        np.testing.assert_array_equal(linears[name].weight, linears[name].grid.round(weight))


def test_starts_from_the_smoothed_weight_and_its_whole_range():
    """Factors of an earlier clip search are not a start: the scale is searched anew."""
    problem = problem_of("W4A8_DYNAMIC")
    smooth = np.exp(np.random.default_rng(5).standard_normal(K)).astype(np.float32)
    clip = {"q": np.full((6, 1), 0.6, np.float32)}
    found = solve(problem, Solution(smooth=smooth, clip=clip), SszOptions())
    for name, weight in problem.weights.items():
        scaled = weight * smooth
        expected = improve(scaled, problem.scheme.weight.fit(scaled, name, BF16))
        np.testing.assert_array_equal(found.grids[name].scale, expected.scale)
        linear = apply(problem, replace(found))[name]
        np.testing.assert_array_equal(linear.grid.scale, expected.scale)
