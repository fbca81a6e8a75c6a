"""The clip search against a search over Python floats."""

from __future__ import annotations

import numpy as np
import pytest
from plans import usual

from ms_quant.algorithms.clip import RATIOS, search_clip, solve
from ms_quant.algorithms.problem import Problem, Solution, apply
from ms_quant.numerics.grid import AffineFormat, TwoLevelFormat
from ms_quant.numerics.storage import DTYPES
from ms_quant.statistics.observers import ActivationStats


def slow_losses(row: np.ndarray, inputs: np.ndarray) -> list[float]:
    """The row's output error for each ratio, everything in float64."""
    losses = []
    for ratio in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55):
        scale = max(abs(float(v)) for v in row) * ratio / 127 or 1.0
        back = [min(127, max(-128, round(float(v) / scale))) * scale for v in row]
        error = [b - float(v) for b, v in zip(back, row, strict=True)]
        outputs = [sum(float(x) * e for x, e in zip(t, error, strict=True)) for t in inputs]
        losses.append(sum(o * o for o in outputs) / len(outputs))
    return losses


def test_grid():
    assert RATIOS == (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)


@pytest.mark.parametrize("inner", [1, 3, 40])
@pytest.mark.parametrize("tokens", [1, 9])
def test_each_row_has_the_ratio_of_the_slow_search(inner, tokens):
    """Its choice is the smallest slow loss up to the float32 sums of the fast one."""
    rng = np.random.default_rng(inner + tokens)
    weight = rng.standard_normal((12, inner)).astype("f4")
    weight[::2, 0] *= 6  # outliers that are worth clipping
    inputs = rng.standard_normal((tokens, inner)).astype("f4")
    inputs[:, 0] *= 0.02
    ratios = search_clip(weight, inputs)
    assert ratios.shape == (12, 1)
    assert ratios.dtype == np.float32
    for row, ratio in zip(weight, ratios[:, 0], strict=True):
        losses = slow_losses(row, inputs)
        chosen = losses[[float(np.float32(r)) for r in RATIOS].index(float(ratio))]
        # A relative 2**-24 of each product and sum, squared, against the largest output error.
        magnitude = np.abs(inputs).max() * np.abs(row).sum()
        slack = (inner + 4) * 2.0**-24 * magnitude
        assert np.sqrt(chosen) <= np.sqrt(min(losses)) + 2 * slack
    if inner == 40:
        assert (ratios[::2] < 1).any(), "the outliers no longer make clipping worth it"


def test_rows_do_not_influence_each_other():
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((7, 30)).astype("f4")
    inputs = rng.integers(-8, 9, (16, 30)).astype("f4")
    together = search_clip(weight, inputs)
    for n in range(7):
        np.testing.assert_array_equal(search_clip(weight[n : n + 1], inputs), together[n : n + 1])


@pytest.mark.parametrize(
    ("weight", "inputs"),
    [
        ([[0, 0, 0]], [[1, 2, 3]]),  # an all-zero row has no error at any ratio
        ([[1, 2, 3]], [[0, 0, 0]]),  # nothing comes in
        ([[127, -127, 5]], [[1, 1, 1]]),  # exact without clipping
    ],
)
def test_ties_go_to_the_larger_ratio(weight, inputs):
    assert search_clip(np.float32(weight), np.float32(inputs)).tolist() == [[1.0]]


def test_an_outlier_that_no_input_excites_is_clipped():
    """Column 0 sees zeros, so its error is free; 0.55 gives the others the finest steps."""
    weight = np.float32([[1.0, 0.31, -0.24, 0.17]])
    inputs = np.float32([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    losses = slow_losses(weight[0], inputs)
    best = RATIOS[losses.index(min(losses))]
    assert best < 1
    assert search_clip(weight, inputs)[0, 0] == np.float32(best)


FORMATS = [
    AffineFormat(bits, group, symmetric)
    for bits in (8, 4)
    for group in (0, 4, 8)
    for symmetric in (True, False)
]


def slow_group_loss(part: np.ndarray, inputs: np.ndarray, format: AffineFormat, ratio: float):
    """The output error of one group of a row at a ratio, in float64 but for scale and code."""
    smallest, largest = (-8, 7) if format.bits == 4 else (-128, 127)
    low, high = min(0.0, float(part.min())) * ratio, max(0.0, float(part.max())) * ratio
    if format.symmetric:
        scale, zero = np.float32(max(-low, high) / largest), 0
    else:
        scale = np.float32((high - low) / (largest - smallest))
        zero = min(largest, max(smallest, round(smallest - low / float(scale)))) if scale else 0
    scale = scale or np.float32(1)
    codes = [round(float(np.float32(v / scale) + np.float32(zero))) for v in part]
    back = [(min(largest, max(smallest, code)) - zero) * float(scale) for code in codes]
    error = np.array(back) - part.astype(np.float64)
    return float(np.square(inputs.astype(np.float64) @ error).mean())


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_each_group_has_the_ratio_of_the_slow_search(format, tokens):
    rng = np.random.default_rng(format.bits + tokens)
    weight = rng.standard_normal((6, 16)).astype(np.float32)
    weight[::2, ::4] *= 5
    weight[1, :8] = 0
    inputs = rng.standard_normal((tokens, 16)).astype(np.float32)
    inputs[:, ::4] *= 0.02
    fit = lambda w, ratio: format.fit(w, "w", clip=ratio)  # noqa: E731
    ratios = search_clip(weight, inputs, fit)
    size = format.group_size or 16
    assert ratios.shape == (6, 16 // size)
    for n, g in np.ndindex(ratios.shape):
        part = slice(g * size, (g + 1) * size)
        losses = [slow_group_loss(weight[n, part], inputs[:, part], format, r) for r in RATIOS]
        chosen = losses[[float(np.float32(r)) for r in RATIOS].index(float(ratios[n, g]))]
        # a relative 2**-24 of each product and sum, squared, against the largest output error
        slack = (size + 4) * 2.0**-24 * np.abs(inputs).max() * np.abs(weight[n, part]).sum()
        assert np.sqrt(chosen) <= np.sqrt(min(losses)) + 2 * slack
    assert (ratios[1, : 8 // size] == 1).all()
    if format.bits == 4:
        assert (ratios[::2] < 1).any(), "the outliers no longer make clipping worth it"


def test_groups_of_two_levels_are_searched():
    """The ratio is of the second level; the row's own scale stays."""
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((4, 32)).astype(np.float32)
    weight[:, ::8] *= 6
    inputs = rng.standard_normal((7, 32)).astype(np.float32)
    inputs[:, ::8] *= 0.01
    format = TwoLevelFormat(8)
    ratios = search_clip(weight, inputs, lambda w, ratio: format.fit(w, "w", clip=ratio))
    grids = [format.fit(weight, "w", clip=ratio) for ratio in RATIOS]
    for n, g in np.ndindex(4, 4):
        part = slice(8 * g, 8 * g + 8)
        losses = []
        for grid in grids:
            error = grid.values(grid.round(weight))[n, part] - weight[n, part].astype(np.float64)
            losses.append(np.square(inputs[:, part].astype(np.float64) @ error).mean())
        chosen = losses[RATIOS.index(round(float(ratios[n, g]), 2))]
        assert chosen <= min(losses) * (1 + 1e-4)
    assert (ratios < 1).any()


def test_solve_searches_the_weights_as_they_will_be_rounded():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((20, 32)).astype(np.float32)
    stats = ActivationStats(32, len(x))
    stats.update(x)
    weights = {f"{n}_proj": rng.standard_normal((4, 32)).astype(np.float32) for n in "qkv"}
    scheme, scales = usual("W4A16", group_size=32)
    problem = Problem(
        "qkv",
        scheme,
        weights,
        {},
        stats,
        DTYPES["bfloat16"],
        lambda c: 0.0,
        scale_type=scales,
    )
    smooth = np.exp(rng.standard_normal(32)).astype(np.float32)
    found = solve(problem, Solution(smooth=smooth), skip=("q_proj",))
    assert set(found.clip) == {"k_proj", "v_proj"}
    for name, factors in found.clip.items():
        scaled = weights[name] * smooth
        fit = lambda w, ratio: scheme.weight.fit(w, "w", DTYPES["bfloat16"], ratio)  # noqa: E731
        np.testing.assert_array_equal(factors, search_clip(scaled, x / smooth, fit))
        grid = apply(problem, found)[name].grid
        np.testing.assert_array_equal(
            grid.scale, scheme.weight.fit(scaled, name, DTYPES["bfloat16"], factors).scale
        )


@pytest.mark.parametrize("seed", range(8))
def test_rows_of_one_scale_have_one_ratio(seed):
    """The one with the smallest error of all rows together; 1 is a candidate."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((8, 24)) * np.exp(rng.standard_normal((8, 1)))).astype("f4")
    weight[:, 0] *= 4
    inputs = rng.standard_normal((50, 24)).astype(np.float32)
    inputs[:, 0] *= 0.01
    format = AffineFormat(8, per_tensor=True)
    ratios = search_clip(weight, inputs, lambda w, ratio: format.fit(w, "w", clip=ratio))
    assert (ratios == ratios[0]).all()

    def loss(ratio: np.ndarray | float) -> float:
        grid = format.fit(weight, "w", clip=ratio)
        error = grid.values(grid.round(weight)) - weight.astype(np.float64)
        return float(np.square(inputs @ error.T).sum())

    assert loss(ratios) <= min(map(loss, RATIOS)) * (1 + 1e-4)
