"""The low-rank branch against the exact singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest

from ms_quant.algorithms import get_algorithms
from ms_quant.algorithms.problem import Problem, Solution, apply, checked
from ms_quant.algorithms.svd import SvdOptions, low_rank, solve
from ms_quant.numerics.storage import DTYPES
from ms_quant.schemes.table import get_scheme

F32, BF16, F16 = DTYPES["float32"], DTYPES["bfloat16"], DTYPES["float16"]
K = 128


def with_spectrum(values: np.ndarray, rows: int = 96, seed: int = 0) -> np.ndarray:
    """A matrix (rows, K) with these singular values."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, rows)))[0][:, : len(values)]
    right = np.linalg.qr(rng.standard_normal((K, K)))[0][: len(values)]
    return (left * values @ right).astype(np.float32)


@pytest.mark.parametrize("rank", [1, 4, 16, 32])
@pytest.mark.parametrize(("decay", "share"), [(0.5, 0.99), (0.1, 0.99), (0.03, 0.9)])
def test_what_is_captured_is_nearly_the_best(decay, share, rank):
    """Within a hundredth where the spectrum falls; where it is nearly flat, with neighbours 3 %
    apart, a random basis of rank + 8 mixes some, which then matter as little."""
    values = np.exp(-decay * np.arange(96))
    weight = with_spectrum(values)
    branch = low_rank(weight, rank, F32)
    assert branch.l1.shape == (rank, K) and branch.l2.shape == (96, rank)
    left = np.square(weight.astype(np.float64) - branch.weight).sum()
    captured = np.square(weight.astype(np.float64)).sum() - left
    assert captured >= share * np.square(values[:rank]).sum()
    # float32: an error of 2**-24 of the largest value for each of 96 * 128 elements is 1e-10
    assert left <= 1.05 * np.square(values[rank:]).sum() + 1e-10


def test_factors_are_singular_vectors():
    """l1 has orthonormal rows, l2 orthogonal columns as long as the singular values."""
    values = 2.0 ** -np.arange(40)
    branch = low_rank(with_spectrum(values), 8, F32)
    np.testing.assert_allclose(branch.l1 @ branch.l1.T, np.eye(8), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(branch.l2, axis=0), values[:8], rtol=1e-5)


@pytest.mark.parametrize("rank", [3, 8])
def test_a_matrix_of_low_rank_is_captured_whole(rank):
    weight = with_spectrum(np.array([5.0, 2.0, 1.0]))
    np.testing.assert_allclose(low_rank(weight, rank, F32).weight, weight, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 5), (12, 12), (0, 8)])
def test_the_rank_is_at_most_that_of_the_shape(shape):
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    branch = low_rank(weight, 32, F32)
    assert branch.l1.shape == (min(shape), shape[1])
    assert branch.l2.shape == (shape[0], min(shape))
    np.testing.assert_allclose(branch.weight, weight, atol=1e-5)


def test_zeros_have_a_branch_of_zeros():
    branch = low_rank(np.zeros((16, 24), np.float32), 4, BF16)
    assert not branch.weight.any() and np.isfinite(branch.l1).all()


def test_is_deterministic_and_leaves_the_global_generator_alone():
    weight = with_spectrum(np.exp(-0.05 * np.arange(96)))
    before = np.random.get_state()[1].tolist()
    first, second = (low_rank(weight, 8, BF16) for _ in range(2))
    assert first.l1.tobytes() == second.l1.tobytes()
    assert first.l2.tobytes() == second.l2.tobytes()
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_factors_are_exact_in_the_stored_type(dtype):
    branch = low_rank(with_spectrum(np.exp(-0.05 * np.arange(96))), 8, dtype)
    for factor in (branch.l1, branch.l2):
        assert factor.dtype == np.float32 and factor.flags.c_contiguous
        np.testing.assert_array_equal(factor.astype(dtype).astype(np.float32), factor)


def problem_of(weights: dict[str, np.ndarray], dtype: np.dtype = BF16) -> Problem:
    scheme = get_scheme("W4A4_MXFP4_SVD")
    return Problem("qk", scheme, weights, {}, None, dtype, lambda candidate: 0.0)


def strong(seed: int) -> np.ndarray:
    """Noise beside eight singular values that are far larger than its own."""
    noise = np.random.default_rng(seed).standard_normal((96, K)).astype(np.float32)
    return 0.1 * noise + with_spectrum(np.full(8, 40.0), seed=seed)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_what_is_left_rounds_better_than_the_whole(dtype):
    problem = problem_of({"q": strong(1), "k": strong(2)}, dtype)
    with_branch = apply(problem, solve(problem, Solution(), SvdOptions(8)))
    plain = apply(problem, Solution())
    for name, weight in problem.weights.items():
        errors = [
            np.square(made[name].float_weight() - weight).sum() for made in (with_branch, plain)
        ]
        assert errors[0] < errors[1] / 4


def test_what_storing_the_factors_loses_is_rounded_too():
    weight = strong(3)
    problem = problem_of({"q": weight})
    solution = solve(problem, Solution(), SvdOptions(8))
    branch = solution.branch["q"]
    assert (branch.weight != low_rank(weight, 8, F32).weight).mean() > 0.9
    rest = checked(problem, solution)["q"]
    np.testing.assert_array_equal(rest, weight - branch.weight)
    linear = apply(problem, solution)["q"]
    rounding = linear.grid.values(linear.weight) - rest
    # the sum of branch and residual in float32, of numbers below 16
    np.testing.assert_allclose(linear.float_weight() - weight, rounding, atol=16 * 2.0**-22)


def test_the_branch_is_of_the_smoothed_weight():
    problem = problem_of({"q": strong(4)})
    smooth = np.exp(np.random.default_rng(5).standard_normal(K)).astype(np.float32)
    solution = solve(problem, Solution(smooth=smooth), SvdOptions(8))
    expected = low_rank(problem.weights["q"] * smooth, 8, BF16)
    np.testing.assert_array_equal(solution.branch["q"].l1, expected.l1)
    linear = apply(problem, solution)["q"]
    x = np.random.default_rng(6).standard_normal((5, K)).astype(np.float32)
    exact = linear.activation.fake(x / smooth) @ linear.grid.values(linear.weight).T
    exact = exact + (x / smooth) @ expected.weight.T
    np.testing.assert_allclose(linear.forward(x), exact, rtol=1e-5, atol=1e-4)


def test_factors_on_ranges_do_not_outlive_the_weight_they_are_of():
    problem = problem_of({"q": strong(7)})
    clip = {"q": np.full((96, 1), 0.5, np.float32)}
    assert not solve(problem, Solution(clip=clip), SvdOptions()).clip


def test_the_scheme_always_has_it_and_no_other_one_does():
    scheme = get_scheme("W4A4_MXFP4_SVD")
    assert get_algorithms("minmax", scheme).names == ("svd",)
    assert get_algorithms("gptq", scheme, {"rank": 16}).chosen["svd"] == {"rank": 16}
