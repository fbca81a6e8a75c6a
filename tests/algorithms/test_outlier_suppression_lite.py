"""The search of OutlierSuppressionLite against brute force, with a loss of the test's own."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest

from ms_quant.algorithms import get_algorithms
from ms_quant.algorithms.outlier_suppression_lite import ALPHAS, solve, with_room
from ms_quant.algorithms.problem import Problem, Solution, apply
from ms_quant.numerics.linear import quantize_linear, static_activation
from ms_quant.numerics.storage import DTYPES
from ms_quant.schemes.table import get_scheme
from ms_quant.statistics.observers import ActivationStats

GRID = [0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]
BF16 = DTYPES["bfloat16"]


def make_problem(loss=None, *, seed=0, outlier=50.0, dtype=BF16):
    """q and k behind one input of 12 channels, one of them an outlier."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((40, 12)).astype("f4")
    x[:, 5] *= outlier
    stats = ActivationStats(12, len(x))
    stats.update(x)
    weights = {
        "q": rng.standard_normal((6, 12)).astype("f4"),
        "k": rng.standard_normal((4, 12)).astype("f4") * 2,
    }
    weights["q"][1, 5] = 9.0
    biases = {"q": rng.standard_normal(6).astype("f4")}

    def output_error(candidate):
        total = 0.0
        for name, linear in candidate.items():
            exact = x @ weights[name].T + biases.get(name, 0)
            total += float(np.square(linear.forward(x) - exact).mean(dtype=np.float64))
        return total

    scheme = get_scheme("W8A8")
    return Problem("qkv", scheme, weights, biases, stats, dtype, loss or output_error)


def slow_smooth(problem: Problem, alpha: float) -> np.ndarray:
    columns = [
        max(abs(float(row[j])) for weight in problem.weights.values() for row in weight)
        for j in range(12)
    ]
    largest, x = problem.stats.absmax.tolist(), problem.stats.rows.astype("f8")
    smooth = [a**alpha / w ** (1 - alpha) for a, w in zip(largest, columns, strict=True)]
    reach = max(a / s for a, s in zip(largest, smooth, strict=True))
    means = [float(np.abs(x[:, j]).mean()) for j in range(12)]
    levels = [mean / statistics.median(means) for mean in means]
    levels = [max(1.0, level) for level in levels]
    tokens = [max(abs(v) / level for v, level in zip(row, levels, strict=True)) for row in x]
    large = float(np.quantile(tokens, 0.9))
    return np.float32([max(s, large * v / reach) for s, v in zip(smooth, levels, strict=True)])


def candidate(problem: Problem, smooth: np.ndarray | None, clip=None):
    """The deployed linears of a choice, built without the code under test's ``apply``."""
    activation = static_activation(
        problem.stats.low, problem.stats.high, smooth, problem.dtype, "x"
    )
    return {
        name: quantize_linear(
            weight,
            problem.biases.get(name),
            activation,
            DTYPES["float32"],
            1.0 if clip is None else clip[name],
        )
        for name, weight in problem.weights.items()
    }


def slow_clip(weight: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """float64 search of each row's ratio, the larger one at a tie."""
    chosen = []
    for row in weight.astype("f8"):
        losses = []
        for ratio in [1 - 0.05 * i for i in range(10)]:
            scale = np.abs(row).max() * ratio / 127
            error = np.clip(np.rint(row / scale), -128, 127) * scale - row
            losses.append(np.square(inputs.astype("f8") @ error).mean())
        chosen.append([round(1 - 0.05 * int(np.argmin(losses)), 2)])
    return np.float32(chosen)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("outlier", [1.0, 50.0])
def test_chooses_what_brute_force_chooses(seed, outlier):
    problem = make_problem(seed=seed, outlier=outlier)
    vectors = [None] + [slow_smooth(problem, alpha) for alpha in GRID]
    losses = [problem.mse(candidate(problem, vector)) for vector in vectors]
    best = int(np.argmin(losses))
    gap = sorted(losses)[1] / losses[best]
    assert gap > 1 + 1e-5, "two candidates are too close for the oracle to tell"
    solution = solve(problem, Solution())
    if best == 0:
        assert solution.smooth is None
        assert "alpha" not in solution.note
    else:
        np.testing.assert_allclose(solution.smooth, vectors[best], rtol=2.0**-22)
        assert solution.note["alpha"] == GRID[best - 1]

    deployed = candidate(problem, solution.smooth)
    smooth = deployed["q"].activation.smooth
    clip = {
        name: slow_clip(weight * smooth, problem.stats.rows / smooth)
        for name, weight in problem.weights.items()
    }
    clipped_loss = problem.mse(candidate(problem, solution.smooth, clip))
    plain_loss = problem.mse(deployed)
    if clipped_loss <= plain_loss:
        for name in problem.weights:
            np.testing.assert_array_equal(solution.clip[name], clip[name])
    else:
        assert not solution.clip
    assert solution.note["loss"] == pytest.approx(min(clipped_loss, plain_loss), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_strength_is_tried_with_ranges_of_other_tokens(seed):
    """Brute force over candidates of those ranges; what is deployed is made of all tokens."""
    problem = make_problem(seed=seed)
    rng = np.random.default_rng(seed + 10)
    others = problem.seen.rows[:20] * rng.uniform(0.2, 0.8, 12).astype("f4")
    low, high = others.min(axis=0), others.max(axis=0)
    apart = replace(problem, unsearched=(low, high))
    tried = replace(problem, stats=problem.seen.within(low, high))
    vectors = [None] + [slow_smooth(tried, alpha) for alpha in GRID]
    losses = [problem.mse(candidate(tried, vector)) for vector in vectors]
    best = int(np.argmin(losses))
    solution = solve(apart, Solution())
    assert best and solution.note["alpha"] == GRID[best - 1]
    deployed = slow_smooth(problem, GRID[best - 1])
    np.testing.assert_allclose(solution.smooth, deployed, rtol=2.0**-22)
    plain = problem.mse(candidate(problem, solution.smooth))
    assert solution.note["loss"] <= plain * (1 + 1e-9)


def test_a_quiet_channel_has_room_for_what_other_channels_show():
    """It was never above 0.1, and others reach 3 and more; the outlier says nothing of them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 12)).astype("f4")
    x[:, 3] *= 0.02
    x[:, 5] *= 1000
    stats = ActivationStats(12, len(x))
    stats.update(x)
    problem = replace(make_problem(), stats=stats)
    smooth = stats.absmax.copy()  # every channel has just the range that was seen
    found = with_room(problem, smooth)
    large = np.quantile(np.abs(np.delete(x, 5, axis=1)).max(axis=1), 0.9)
    assert found[3] == pytest.approx(large, rel=0.3)  # smooth is 1 / range
    np.testing.assert_array_equal(found[[0, 5]], smooth[[0, 5]])
    assert (found >= smooth).all()
    assert np.isfinite(with_room(replace(problem, stats=ActivationStats(12, 0)), smooth)).all()
    dead = ActivationStats(12, 8)
    dead.update(np.zeros((8, 12), np.float32))
    np.testing.assert_array_equal(with_room(replace(problem, stats=dead), smooth), smooth)


def test_static_ranges_are_searched_by_the_error_of_tokens():
    """And those of dynamic schemes by the mean of squares; the block is run for one of them."""
    asked = []

    def error(name):
        return lambda linears: float(asked.append(name) or len(asked))

    for scheme, name in (("W8A8", "token"), ("W8A8_MIX", "token"), ("W8A8_DYNAMIC", "mse")):
        asked.clear()
        problem = replace(make_problem(error("mse")), token_error=error("token"))
        solve(replace(problem, scheme=get_scheme(scheme)), Solution())
        assert set(asked) == {name}


def test_grid_is_golden_sticks():
    assert list(ALPHAS) == GRID


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_loss_is_asked_about_what_will_be_deployed(dtype):
    asked = []

    def loss(linears):
        asked.append(linears)
        return float(len(asked))

    problem = make_problem(loss, dtype=DTYPES[dtype])
    solve(problem, Solution())
    assert len(asked) == 1 + len(GRID) + 1  # no smoothing, the grid, the clipped winner
    vectors = [None] + [slow_smooth(problem, alpha) for alpha in GRID]
    for linears, vector in zip(asked, vectors, strict=False):
        assert sorted(linears) == ["k", "q"]
        activation = linears["q"].activation
        assert linears["k"].activation is activation  # a fused group stores one vector
        stored = activation.input_scale
        np.testing.assert_array_equal(stored.astype(DTYPES[dtype]).astype("f4"), stored)
        expected = candidate(problem, vector)
        for name, linear in linears.items():
            step = expected[name].activation.input_scale
            spacing = 2.0**-7 if dtype == "bfloat16" else 2.0**-10  # the vectors differ by an ulp
            np.testing.assert_allclose(linear.activation.input_scale, step, rtol=spacing)
            assert linear.bias is problem.biases.get(name)


@pytest.mark.parametrize(
    ("losses", "alpha"),
    [
        ([1.0] * 14, None),  # all equal: no smoothing, the first candidate
        ([2.0] + [1.0] * 13, 0.3),  # all alphas equal: the first
        ([2.0, 3.0, 1.0, 1.0] + [2.0] * 10, 0.4),  # a tie between 0.4 and 0.5
        ([1.0] + [2.0] * 13, None),
        ([3.0] * 13 + [1.0], 1.0),
        ([1.0] + [float("nan")] * 13, None),  # NaN is never an improvement
        ([float("inf")] + [5.0] * 13, 0.3),
    ],
)
def test_ties_go_to_the_earlier_candidate(losses, alpha):
    answers = iter([*losses, min(losses)])
    solution = solve(make_problem(lambda linears: next(answers)), Solution())
    assert solution.note.get("alpha") == alpha
    assert (solution.smooth is None) == (alpha is None)
    assert next(answers, None) is None


@pytest.mark.parametrize(
    ("clipped_loss", "kept"), [(0.5, True), (1.0, True), (1.5, False), (float("nan"), False)]
)
def test_clipping_is_kept_if_the_blocks_error_does_not_grow(clipped_loss, kept):
    answers = iter([1.0] + [2.0] * 13 + [clipped_loss])
    solution = solve(make_problem(lambda linears: next(answers)), Solution())
    assert bool(solution.clip) == kept
    assert solution.note["loss"] == (clipped_loss if kept else 1.0)


@pytest.mark.parametrize("seed", range(6))
def test_never_worse_than_minmax_by_its_own_measure(seed):
    problem = make_problem(seed=seed, outlier=[1.0, 1e-3, 300.0][seed % 3])
    minmax = get_algorithms("minmax", problem.scheme).solve(problem)
    found = problem.mse(apply(problem, solve(problem, Solution())))
    assert found <= problem.mse(apply(problem, minmax))


def test_dead_channels_and_columns():
    problem = make_problem()
    for weight in problem.weights.values():
        weight[:, 2] = 0
    problem.weights["q"][3] = 0  # a dead row
    x = problem.stats.rows.copy()
    x[:, 7] = 0
    stats = ActivationStats(12, len(x))
    stats.update(x)
    falling = iter(range(20, 0, -1))
    problem = replace(problem, stats=stats, mse=lambda linears: float(next(falling)))
    smoothed = solve(problem, Solution()).smooth
    assert smoothed is not None
    room = with_room(problem, np.ones(12, np.float32))
    assert smoothed[2] >= 1 and smoothed[7] >= 1 and np.isfinite(room).all()
    for smooth in (None, smoothed):
        linears = apply(problem, Solution(smooth))
        np.testing.assert_array_equal(
            linears["q"].forward(x)[:, 3], np.full(len(x), problem.biases["q"][3])
        )
        assert np.isfinite(linears["q"].float_weight()).all()
