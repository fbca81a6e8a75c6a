"""The column step against the textbook: after each column the rest is solved again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plans import usual

from ms_quant.algorithms import get_algorithms
from ms_quant.algorithms.gptq import (
    BLOCK,
    GptqOptions,
    damped,
    factor_with_retry,
    inverse_factor,
    round_weight,
    shrinkage,
    shrunk,
    solve,
    solve_columns,
)
from ms_quant.algorithms.problem import (
    Problem,
    Solution,
    apply,
    checked,
    seen_hessian,
    seen_inputs,
)
from ms_quant.errors import MsQuantError
from ms_quant.numerics.float_grid import DualMxFormat, DualMxGrid, Float8Format, MxFormat
from ms_quant.numerics.grid import AffineFormat, Grid, TwoLevelFormat, TwoLevelGrid, WeightFormat
from ms_quant.numerics.linear import Kronecker
from ms_quant.numerics.storage import DTYPES
from ms_quant.statistics.observers import ActivationStats


def oracle(weight: np.ndarray, hessian: np.ndarray, step: float) -> np.ndarray:
    """Optimal Brain Quantization in a fixed order: after each column the rest is solved again."""
    weight, rounded = weight.copy(), np.zeros_like(weight)
    for j in range(weight.shape[1]):
        rounded[:, j] = np.rint(weight[:, j] / step) * step
        rest = slice(j + 1, None)
        # the columns after j minimize the error given what has been rounded
        move = np.linalg.solve(hessian[rest, rest], hessian[rest, j])
        weight[:, rest] += np.outer(weight[:, j] - rounded[:, j], move)
    return rounded


def correlated(columns: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3 * columns, columns)) @ rng.normal(size=(columns, columns))
    return x.T @ x / len(x)


@pytest.mark.parametrize("columns", [1, 7, 64, BLOCK + 5])
def test_agrees_with_solving_the_rest_again(columns: int) -> None:
    hessian = damped(correlated(columns, columns))
    weight = np.random.default_rng(1).normal(size=(9, columns))
    step, found = 0.3, np.zeros((9, columns))

    def rounder(j: int, target: np.ndarray) -> np.ndarray:
        found[:, j] = np.rint(target / step) * step
        return found[:, j]

    solve_columns(weight, inverse_factor(hessian), rounder)
    np.testing.assert_array_equal(found, oracle(weight, hessian, step))


@pytest.mark.parametrize("columns", [1, 40, 2 * BLOCK + 3])
def test_the_factor_is_that_of_the_inverse(columns: int) -> None:
    hessian = damped(correlated(columns, 3))
    factor = inverse_factor(hessian)
    assert (np.diagonal(factor) > 0).all() and not np.tril(factor, -1).any()
    np.testing.assert_allclose(factor.T @ factor @ hessian, np.eye(len(hessian)), atol=1e-9)


def test_what_is_left_of_the_error_is_the_sum_over_columns() -> None:
    hessian = damped(correlated(50, 4))
    weight = np.random.default_rng(2).normal(size=(5, 50))
    factor, left = inverse_factor(hessian), np.zeros(5)
    rounded = np.zeros_like(weight)

    def rounder(j: int, target: np.ndarray) -> np.ndarray:
        rounded[:, j] = np.rint(target)
        left[:] += ((target - rounded[:, j]) / factor[j, j]) ** 2
        return rounded[:, j]

    solve_columns(weight, factor, rounder)
    error = weight - rounded
    np.testing.assert_allclose(np.einsum("nk,kl,nl->n", error, hessian, error), left)


def test_channels_that_are_never_used_do_not_matter() -> None:
    dead = np.zeros((6, 6))
    np.testing.assert_array_equal(damped(dead), np.eye(6))
    partly = correlated(6, 5)
    partly[2], partly[:, 2] = 0, 0
    assert np.isfinite(inverse_factor(damped(partly))).all()
    assert damped(np.zeros((0, 0))).shape == (0, 0)


FORMATS = {
    f"int{bits}{'' if symmetric else '_asymmetric'}_{group or 'row'}": AffineFormat(
        bits, group, symmetric
    )
    for bits in (4, 8)
    for group in (0, 32, 64)
    for symmetric in (True, False)
}
FORMATS |= {
    "two_level": TwoLevelFormat(64),
    "float8": Float8Format(),
    "mxfp8": MxFormat("mxfp8_msmodelslim"),
    "mxfp4": MxFormat("mxfp4_msmodelslim"),
    "mxfp4_choosing": MxFormat("mxfp4_msmodelslim_fouroversix"),
    "dual": DualMxFormat("mxfp4_msmodelslim", 64),
}
K = BLOCK + 64  # more than one of the blocks in which errors are passed on


def of_one_group(format: WeightFormat, whole: Grid, columns: np.ndarray, start: int) -> Grid:
    """A grid of one group, fitted to its columns alone: nothing of it can be looked up wrongly.
    What all groups of a row share is that of the whole weight's grid."""
    columns = columns.astype(np.float32)
    if isinstance(format, AffineFormat):
        return AffineFormat(format.bits, 0, format.symmetric).fit(columns, "w")
    if isinstance(format, TwoLevelFormat):
        between = np.clip(np.rint(columns / whole.scale), -128, 127)
        return TwoLevelGrid(whole.scale, AffineFormat(4).fit(between.astype(np.float32), "w"))
    if isinstance(format, DualMxFormat):
        scale = whole.scales[:, [start // format.dual_block_size]]
        return DualMxGrid(
            scale, format.dual_block_size, MxFormat(format.rule).fit(columns / scale, "w")
        )
    return format.fit(columns, "w")


def paper(
    weight: np.ndarray, hessian: np.ndarray, format: WeightFormat, order: np.ndarray, static: bool
) -> np.ndarray:
    """Values of a weight by arXiv 2210.17323, equations 2 and 3, in float64.

    The inverse of the Hessian of the remaining columns is there in full, and each rounded column
    is eliminated from it; nothing is factored, delayed or done in blocks.
    """
    whole, group = format.fit(weight, "w"), format.group_size or weight.shape[1]
    current, rounded = weight.astype(np.float64), np.zeros(weight.shape, np.float32)
    inverse, left = np.linalg.inv(hessian), list(order)
    grids = {
        g: of_one_group(format, whole, weight[:, g * group : (g + 1) * group], g * group)
        for g in range(-(-weight.shape[1] // group))
    }
    for column in order:
        g = column // group
        if not static and column % group == 0:
            grids[g] = of_one_group(format, whole, current[:, column : column + group], column)
        target = current[:, column : column + 1].astype(np.float32)
        rounded[:, column] = grids[g].values(grids[g].round(target))[:, 0]
        error = (current[:, column] - rounded[:, column]) / inverse[column, column]
        left.remove(column)
        current[:, left] -= np.outer(error, inverse[column, left])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return rounded


def left_over(weight: np.ndarray, values: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """The error of each row, e H e^T."""
    error = weight.astype(np.float64) - values
    return np.einsum("nk,kl,nl->n", error, hessian, error)


def column_order(hessian: np.ndarray, act_order: bool) -> np.ndarray:
    columns = range(len(hessian))
    return np.array(sorted(columns, key=lambda j: -hessian[j, j]) if act_order else list(columns))


def outliers(rows: int, columns: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)) * np.exp(rng.standard_normal(columns))
    return weight.astype(np.float32)


def assert_as_paper(found: np.ndarray, expected: np.ndarray, weight, hessian) -> None:
    """Rows have the same codes, or one went apart at a value next to a rounding boundary.

    Scales that follow from changed columns differ in their last bits; a code more or less is at
    least one part in 255 of a value. The columns are carried in float32, and by the oracle in
    float64, so that targets are some 2**-20 of a step apart, and one in a thousand rows of 192
    has a target that near to a boundary. The row then goes on from another target, with an error
    as good as the other's.
    """
    apart = ~np.isclose(found, expected, rtol=1e-4, atol=0).all(axis=1)
    assert apart.sum() <= 1
    mine, other = (left_over(weight, v, hessian).sum() for v in (found, expected))
    assert mine == pytest.approx(other, rel=0.05 if apart.any() else 1e-4)


GROUPED = [name for name, format in FORMATS.items() if format.group_size]
CASES = [(name, True, act_order) for name in FORMATS for act_order in (False, True)]
CASES += [(name, False, False) for name in GROUPED]  # act_order needs groups that stay


@pytest.mark.parametrize(("name", "static", "act_order"), CASES)
def test_is_the_paper(name, static, act_order):
    format = FORMATS[name]
    weight, hessian = outliers(8, K, 5), damped(correlated(K, 6))
    order = column_order(hessian, act_order)
    grid = format.fit(weight, "w")
    factor = inverse_factor(hessian[order][:, order])
    codes = round_weight(weight, grid, factor, order, refit=not static)
    expected = paper(weight, hessian, format, order, static)
    assert_as_paper(grid.values(codes), expected, weight, hessian)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_permuted_column_has_the_parameters_of_its_own_place(bits):
    """With a diagonal Hessian no error is passed on, so codes are the nearest in any order. The
    scales of groups are a hundredfold apart: by another one's they would be 0 or clip."""
    weight = outliers(3, 128, 1) * np.repeat(np.float32([1, 100, 1e4, 1e6]), 32)
    grid = AffineFormat(bits, 32).fit(weight, "w")
    hessian = np.diag(np.random.default_rng(2).uniform(1, 2, 128))
    order = column_order(hessian, act_order=True)
    codes = round_weight(weight, grid, inverse_factor(hessian[order][:, order]), order, False)
    np.testing.assert_array_equal(codes, grid.round(weight))
    by_position = grid.round(weight[:, order])
    assert (by_position != codes[:, order]).mean() > 0.2, "the groups are no longer apart"


CONFIGURATIONS = [
    ("W4A16", {"group_size": 0}),
    ("W4A16", {"group_size": 32}),
    ("W4A16", {"group_size": 32, "symmetric": False}),
    ("W8A16", {"group_size": 0}),
    ("W4A8_DYNAMIC", {"group_size": 64}),
    ("W8A8FP8_DYNAMIC", {}),
    ("W4A4_MXFP4", {}),
    ("W4A4_MXFP4_DUALSCALE", {}),
    ("W8A8", {}),
]


def no_loss(candidate):
    raise AssertionError("GPTQ searches nothing")


def problem_of(
    scheme: str, more: dict, seed: int = 0, *, columns: int = 128, dead: tuple[int, ...] = ()
) -> tuple[Problem, np.ndarray]:
    """Two linears behind correlated inputs, and the inputs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3 * columns, columns)) @ rng.standard_normal((columns, columns))
    x = (x * np.exp(rng.standard_normal(columns))).astype(np.float32)
    x[:, dead] = 0
    stats = ActivationStats(columns, len(x), with_hessian=True)
    stats.update(x)
    weights = {name: outliers(6, columns, seed + i) for i, name in enumerate("qk")}
    dtype = DTYPES["bfloat16"]
    chosen, scales = usual(scheme, **more)
    return Problem("qk", chosen, weights, {}, stats, dtype, no_loss, scale_type=scales), x


def chain_error(problem: Problem, x: np.ndarray, algorithm: str, **settings) -> float:
    """Mean squared error of the linears' outputs, weights quantized and inputs not."""
    solution = get_algorithms(algorithm, problem.scheme, settings).solve(problem)
    return sum(
        float(np.square(x @ (linear.float_weight() - problem.weights[name]).T).mean())
        for name, linear in apply(problem, solution).items()
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("scheme", "more"), CONFIGURATIONS, ids=str)
def test_is_better_than_rounding_to_nearest(scheme, more, seed):
    problem, x = problem_of(scheme, more, seed)
    nearest = chain_error(problem, x, "minmax")
    assert chain_error(problem, x, "gptq") < nearest
    assert chain_error(problem, x, "gptq", static_groups=True) < nearest
    assert chain_error(problem, x, "gptq", static_groups=True, act_order=True) < nearest


def test_act_order_needs_groups_that_stay():
    for more in ({"group_size": 32}, {"group_size": 32, "symmetric": False}):
        problem, _ = problem_of("W4A16", more)
        with pytest.raises(MsQuantError, match=r"^qk: act_order .* groups of 32 needs static_gro"):
            solve(problem, Solution(), GptqOptions(act_order=True))
    for scheme, more in [("W4A16", {"group_size": 0}), ("W8A8FP8_DYNAMIC", {})]:
        problem, x = problem_of(scheme, more)
        assert chain_error(problem, x, "gptq", act_order=True) < chain_error(problem, x, "minmax")


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("scheme", "more", "before"),
    [
        ("W4A16", {"group_size": 32}, "clip"),
        ("W4A16", {"group_size": 32}, "ssz"),
        ("W4A16", {"group_size": 0}, "ssz"),
        ("W8A8", {}, "smoothquant"),
        ("W8A8", {}, "smoothquant+clip"),
        ("W8A8_DYNAMIC", {}, "smoothquant+ssz"),
        ("W4A8_DYNAMIC", {"group_size": 64}, "smoothquant+clip"),
    ],
    ids=str,
)
def test_takes_the_grids_that_others_have_chosen(scheme, more, before, act_order):
    """Scales are those of the chain without GPTQ, and codes those of the paper's column step."""
    problem, x = problem_of(scheme, more)
    settings = {"act_order": act_order}
    without = get_algorithms(before, problem.scheme).solve(problem)
    found = get_algorithms(f"{before}+gptq", problem.scheme, settings).solve(problem)
    plain, linears = apply(problem, without), apply(problem, found)
    error = dict.fromkeys(("plain", "gptq"), 0.0)
    share = 4 * 128 / (4 * 128 + len(x))
    hessian = damped(shrunk(seen_hessian(problem, found), share))
    order = column_order(seen_hessian(problem, found), act_order)
    factor = inverse_factor(hessian[order][:, order])
    for name, weight in checked(problem, found).items():
        for key, array in plain[name].grid.arrays().items():
            np.testing.assert_array_equal(linears[name].grid.arrays()[key], array)
        codes = round_weight(weight, plain[name].grid, factor, order, refit=False)
        np.testing.assert_array_equal(linears[name].weight, codes)
        for label, made in (("plain", plain), ("gptq", linears)):
            change = made[name].float_weight() - problem.weights[name]
            error[label] += float(np.square(x @ change.T).mean())
    assert error["gptq"] < error["plain"]


def test_the_hessian_is_that_of_the_smoothed_inputs():
    problem, x = problem_of("W8A8_DYNAMIC", {})
    smooth = np.exp(np.random.default_rng(3).standard_normal(128)).astype(np.float32)
    found = seen_hessian(problem, Solution(smooth=smooth))
    inputs = of_one_length(x) / smooth
    exact = inputs.T @ inputs / len(x)
    # 384 products of rounded rows, their sums, the mean and two divisions in float32
    size = np.sqrt(np.outer(np.diagonal(exact), np.diagonal(exact)))
    assert (np.abs(found - exact) <= 393 * 2.0**-24 * size).all()


def of_one_length(x: np.ndarray) -> np.ndarray:
    """float64 tokens over their root mean squares."""
    return np.array([row / np.sqrt(np.mean(row**2)) for row in x.astype("f8")])


def test_a_massive_token_decides_no_more_than_any_other():
    """It is a thousand times as large; what it says of its own channels stays a 384th of all."""
    problem, x = problem_of("W4A16", {"group_size": 0})
    massive = x.copy()
    massive[7] *= 1000
    stats = ActivationStats(128, len(x), with_hessian=True)
    stats.update(massive)
    same = seen_hessian(replace(problem, stats=stats), Solution())
    np.testing.assert_allclose(same, seen_hessian(problem, Solution()), rtol=1e-4, atol=1e-5)
    stats = ActivationStats(128, len(x), with_hessian=True, equal_tokens=False)
    stats.update(x)
    np.testing.assert_allclose(stats.hessian, x.T.astype("f8") @ x / len(x), rtol=1e-3, atol=1e-2)


def test_few_tokens_shrink_the_hessian_to_its_diagonal():
    hessian = correlated(6, 1).astype(np.float32)
    found = shrunk(hessian.copy(), 0.75)
    for i in range(6):
        for j in range(6):
            assert found[i, j] == pytest.approx(hessian[i, j] * (1 if i == j else 0.25))
    assert shrinkage(128, 0) == 1
    assert shrinkage(128, 512) == 0.5  # four tokens for each channel
    assert shrinkage(128, 10**9) < 1e-6
    problem, _ = problem_of("W4A16", {"group_size": 0})
    alone = get_algorithms("gptq", problem.scheme, {"shrinkage": 1}).solve(problem)
    plain = apply(problem, get_algorithms("minmax", problem.scheme).solve(problem))
    for name, linear in apply(problem, alone).items():  # nothing is passed on
        np.testing.assert_array_equal(linear.weight, plain[name].weight)


def test_the_hessian_is_that_of_the_transformed_inputs():
    problem, x = problem_of("W8A8_DYNAMIC", {})
    rng = np.random.default_rng(4)
    smooth = np.exp(rng.standard_normal(128)).astype(np.float32)
    factors = [np.eye(n) + 0.1 * rng.standard_normal((n, n)) for n in (8, 16)]
    kronecker = Kronecker(*(matrix.astype(np.float32) for matrix in factors))
    solution = Solution(smooth=smooth, kronecker=kronecker)
    whole = np.kron(kronecker.left.astype("f8"), kronecker.right)
    inputs = (x / smooth.astype("f8")) @ whole
    np.testing.assert_allclose(seen_inputs(problem, solution), inputs, rtol=1e-4, atol=1e-3)
    even = (of_one_length(x) / smooth.astype("f8")) @ whole
    exact = even.T @ even / len(x)
    found = seen_hessian(problem, solution)
    assert found.flags.c_contiguous
    assert np.abs(found - exact).max() <= 1e-4 * np.diagonal(exact).max()
    # and the weights have taken the inverse, so that the product stays
    for name, weight in checked(problem, solution).items():
        product = x.astype("f8") @ problem.weights[name].T
        assert np.abs(inputs @ weight.T - product).max() <= 1e-4 * np.abs(product).max()
        linear = apply(problem, solution)[name]
        step = np.abs(weight).max(axis=1, keepdims=True) / 127
        assert (np.abs(linear.grid.values(linear.weight) - weight) <= step * 0.51).all()


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_PER_CHANNEL", "W8A8_MIX"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_a_chosen_range_is_one_of_the_smoothed_input(scheme, smoothed):
    problem, _ = problem_of(scheme, {})
    smooth = np.exp(np.random.default_rng(5).standard_normal(128)).astype(np.float32)
    solution = Solution(smooth=smooth if smoothed else None, input_range=(-2.0, 3.1))
    static = apply(problem, solution)["q"].static
    assert 5.1 / 255 * (1 - 1e-6) <= static.scale <= 5.1 / 255 * (1 + 2.0**-7)  # bfloat16
    assert static.offset == round(-128 + 2 / float(static.scale))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_hessian_that_is_not_finite_is_refused_by_name(value):
    """Products of channels overflow long before the channels do."""
    problem, _ = problem_of("W4A16", {"group_size": 0})
    problem.stats.products[0, 0] = value
    with pytest.raises(MsQuantError, match=r"^qk: Hessian: 1 of 16384 values are NaN or inf"):
        solve(problem, Solution(), GptqOptions())


def test_a_hessian_that_is_not_positive_gets_more_damping():
    """Its eigenvalues are 2.01 and -0.01: 0.0001 and 0.001 of the diagonal's 1 are too little."""
    hessian = np.float64([[1, 1.01], [1.01, 1]])
    factor, damping = factor_with_retry(hessian, 1e-4, "qk")
    assert damping == pytest.approx(0.1)  # 0.01 leaves an eigenvalue of 0, up to rounding
    np.testing.assert_allclose(factor.T @ factor @ damped(hessian, damping), np.eye(2), atol=1e-12)
    with pytest.raises(
        MsQuantError,
        match=r"^qk: the Hessian of 2 inputs is not positive definite with damping 0\.1$",
    ):
        factor_with_retry(np.float64([[1, 2], [2, 1]]), 1e-4, "qk")


def test_more_damping_is_noted():
    problem, _ = problem_of("W4A16", {"group_size": 0}, columns=2)
    problem.stats.products = np.float32([[1, 1.005], [1.005, 1]]) * problem.stats.tokens
    options = GptqOptions(damping=1e-3, shrinkage=0)
    assert solve(problem, Solution(), options).note == {"damping": pytest.approx(1e-2)}
    problem.stats.products = np.float32([[1, 0.5], [0.5, 1]]) * problem.stats.tokens
    assert not solve(problem, Solution(), options).note


def test_fewer_tokens_than_inputs_will_do():
    problem, x = problem_of("W4A16", {"group_size": 32})
    stats = ActivationStats(128, 3, with_hessian=True)
    stats.update(x[:3])
    problem = replace(problem, stats=stats)
    assert chain_error(problem, x[:3], "gptq") < chain_error(problem, x[:3], "minmax")


@pytest.mark.parametrize("rows", [5, 1, 0])
@pytest.mark.parametrize("name", ["int4_row", "int8_asymmetric_row", "float8", "mxfp4", "dual"])
def test_one_column_is_rounded_to_nearest(name, rows):
    weight = outliers(rows, 1, 9)
    grid = FORMATS[name].fit(weight, "w")
    codes = round_weight(weight, grid, np.float64([[0.7]]), np.array([0]), refit=False)
    np.testing.assert_array_equal(codes, grid.round(weight))


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_does_not_depend_on_others(name):
    weight, hessian = outliers(4, K, 5), damped(correlated(K, 6))
    factor, order = inverse_factor(hessian), np.arange(K)
    refit = bool(FORMATS[name].group_size)

    def codes(rows: np.ndarray) -> np.ndarray:
        return round_weight(rows, FORMATS[name].fit(rows, "w"), factor, order, refit)

    together = codes(weight)
    alone = np.concatenate([codes(weight[n : n + 1]) for n in range(4)])
    assert (together != alone).any(axis=1).sum() <= 1  # BLAS may sum in another order


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("scheme", "more"), CONFIGURATIONS, ids=str)
def test_dead_channels_are_rounded_to_nearest(scheme, more, act_order):
    """Nothing is known of them, and what becomes of them has no influence on the others."""
    dead = (0, 5, 77)
    problem, _ = problem_of(scheme, more, dead=dead)
    options = GptqOptions(act_order=act_order, static_groups=True)
    solution = solve(problem, Solution(), options)
    for name, weight in checked(problem, solution).items():
        grid, codes = solution.grids[name], solution.codes[name]
        np.testing.assert_array_equal(codes[:, dead], grid.round(weight)[:, dead])


def test_inputs_that_are_all_zero_round_to_nearest():
    problem, _ = problem_of("W4A16", {"group_size": 32}, dead=tuple(range(128)))
    solution = solve(problem, Solution(), GptqOptions())
    for name, weight in problem.weights.items():
        grid = problem.scheme.weight.fit(weight, name, problem.dtype)
        np.testing.assert_array_equal(solution.codes[name], grid.round(weight))
