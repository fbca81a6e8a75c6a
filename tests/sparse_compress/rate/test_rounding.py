"""Rate-distortion rounding against slow oracles in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_compress.codec import encoded_size
from sparse_compress.rate import rounding
from sparse_compress.rate.dictionary import Dictionary, pair_saving
from sparse_compress.rate.rounding import (
    column_step,
    curvature,
    descend,
    output_power,
    refit_scale,
    relative_error,
    round_matrix,
)

RUN = 32
CodeBits = Callable[[np.ndarray, Dictionary], int]


def case(rows: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the Hessian of correlated inputs."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(columns, columns)) * np.exp(rng.normal(0, 0.5, columns))
    x = rng.normal(size=(4 * columns, columns)) @ mix + rng.normal(size=(4 * columns, columns))
    weight = rng.normal(0, 0.02, (rows, columns)).astype(np.float32)
    return weight, (x.T @ x / len(x)).astype(np.float32)


def total_cost(
    weight: np.ndarray,
    hessian: np.ndarray,
    price: float,
    scale: np.ndarray,
    codes: np.ndarray,
    dictionary: Dictionary,
    code_bits: CodeBits,
) -> float:
    error = weight.astype(np.float64) - codes * scale[:, None].astype(np.float64)
    squared = np.einsum("nk,kl,nl->", error, hessian.astype(np.float64), error)
    return float(squared) + price * code_bits(codes, dictionary)


def slow_column_step(
    weight: np.ndarray,
    hessian: np.ndarray,
    price: float,
    scale: np.ndarray,
    dictionary: Dictionary,
) -> np.ndarray:
    """Row by row and column by column, all values tried, the rest solved again each time."""
    prices = {**dict.fromkeys(range(-127, 128), 12), **dictionary.prices()}
    codes = np.zeros(weight.shape, np.int8)
    for r, row in enumerate(weight.astype(np.float64)):
        is_open = False
        for j in range(len(row)):
            if j % RUN == 0:
                is_open = False
            rest = slice(j + 1, None)
            move = np.linalg.solve(hessian[rest, rest], hessian[rest, j])
            left = hessian[j, j] - hessian[j, rest] @ move
            prices[dictionary.first] = 0 if is_open else 3 - pair_saving(dictionary.first_share)
            costs = {
                value: left * (row[j] - value * scale[r]) ** 2 + price * bits
                for value, bits in prices.items()
            }
            best = min(costs, key=lambda value: costs[value])
            is_open = best == dictionary.first and not is_open
            codes[r, j] = best
            row[rest] += (row[j] - best * scale[r]) * move
    return codes


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (6, 70)])
def test_the_column_step_is_the_slow_one(rows: int, columns: int) -> None:
    weight, hessian = case(rows, columns, columns)
    curved = curvature(hessian)
    scale = np.full(rows, 0.004, np.float32)
    price = 3e-6 * float(np.mean(curved.importance))
    dictionary = Dictionary(np.array([0, -3, 4, 7, -8, 12, 16, -13, 20, -18]), 0.3)
    found = column_step(weight, curved, price, scale, dictionary)
    expected = slow_column_step(weight, curved.hessian.astype(np.float64), price, scale, dictionary)
    np.testing.assert_array_equal(found, expected)


@settings(deadline=None, max_examples=15)
@given(
    rows=st.integers(1, 5),
    columns=st.sampled_from([1, 31, 32, 33, 130]),
    seed=st.integers(0, 1000),
    price=st.sampled_from([1e-7, 1e-5, 1e-3]),
)
def test_descent_never_goes_up(
    code_bits: CodeBits, rows: int, columns: int, seed: int, price: float
) -> None:
    weight, hessian = case(rows, columns, seed)
    hessian = curvature(hessian).hessian
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.002, 0.01, rows).astype(np.float32)
    codes = np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8)
    dictionary = Dictionary.of(codes)
    costs = [total_cost(weight, hessian, price, scale, codes, dictionary, code_bits)]
    for _ in range(3):
        descend(weight, hessian, price, scale, dictionary, codes)
        costs.append(total_cost(weight, hessian, price, scale, codes, dictionary, code_bits))
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(costs)), costs


def test_where_descent_ends_no_single_change_helps(code_bits: CodeBits) -> None:
    weight, hessian = case(2, 40, 9)
    hessian, price = curvature(hessian).hessian, 2e-5
    scale = np.full(2, 0.01, np.float32)
    codes = np.rint(weight / scale[:, None]).astype(np.int8)
    dictionary = Dictionary.of(codes)
    for _ in range(30):
        before = codes.copy()
        descend(weight, hessian, price, scale, dictionary, codes)
        if (codes == before).all():
            break
    least = total_cost(weight, hessian, price, scale, codes, dictionary, code_bits)
    for r in range(2):
        for j in range(40):
            for value in range(-8, 9):
                changed = codes.copy()
                changed[r, j] = value
                cost = total_cost(weight, hessian, price, scale, changed, dictionary, code_bits)
                assert cost >= least * (1 - 1e-5), (r, j, value)


def test_the_refit_is_least_squares() -> None:
    weight, hessian = case(4, 20, 3)
    codes = np.rint(weight / 0.01).astype(np.int8)
    codes[3] = 0
    scale = np.full(4, 0.009, np.float32)
    found = refit_scale(weight, hessian, codes, scale)
    root = np.linalg.cholesky(hessian.astype(np.float64) + 1e-9 * np.eye(20))
    for r in range(3):
        x, y = codes[r] @ root, weight[r] @ root
        assert found[r] == pytest.approx(x @ y / (x @ x), rel=1e-4)
    assert found[3] == scale[3]


@settings(deadline=None, max_examples=15)
@given(
    rows=st.sampled_from([1, 2, 17]),
    columns=st.sampled_from([1, 5, 64, 129]),
    seed=st.integers(0, 1000),
    factor=st.sampled_from([1e-6, 1e-3, 0.1, 10.0]),
)
def test_any_shape_and_price(rows: int, columns: int, seed: int, factor: float) -> None:
    weight, hessian = case(rows, columns, seed)
    power = output_power(weight, hessian)
    codes, scale = round_matrix(weight, curvature(hessian), factor * power / weight.size)
    assert codes.shape == weight.shape and codes.dtype == np.int8 and codes.min() >= -127
    assert scale.shape == (rows,) and scale.dtype == np.float32
    assert np.isfinite(scale).all() and (scale > 0).all()


def test_nothing_to_round() -> None:
    curved = curvature(np.zeros((8, 8), np.float32))
    codes, scale = round_matrix(np.zeros((3, 8), np.float32), curved, 1.0)
    assert not codes.any() and (scale == 1).all()
    assert round_matrix(np.zeros((0, 8), np.float32), curved, 1.0).codes.shape == (0, 8)
    weight = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    rounded = round_matrix(weight, curved, 1e-6)  # no input was ever seen
    assert np.abs(weight - rounded.codes * rounded.scale[:, None]).max() < 0.02
    assert relative_error(weight, np.zeros((8, 8)), rounded) == 0.0


def test_rows_may_be_worked_on_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = case(50, 64, 5)
    price = 0.01 * output_power(weight, hessian) / weight.size
    curved = curvature(hessian)
    whole = round_matrix(weight, curved, price)
    monkeypatch.setattr(rounding, "ELEMENTS", 64 * 16)
    parts = round_matrix(weight, curved, price)
    same = (whole.codes == parts.codes).mean()  # sums of another order may round otherwise
    assert same > 0.999
    np.testing.assert_allclose(whole.scale, parts.scale, rtol=1e-4)


def rtn(weight: np.ndarray, step: float) -> rounding.Rounded:
    scale = np.full(len(weight), step, np.float32)
    return rounding.Rounded(np.clip(np.rint(weight / step), -127, 127).astype(np.int8), scale)


def test_smaller_and_better_than_rounding_to_nearest() -> None:
    weight, hessian = case(256, 256, 7)
    price = 0.003 * output_power(weight, hessian) / weight.size
    ours = round_matrix(weight, curvature(hessian), price)
    error, size = relative_error(weight, hessian, ours), encoded_size(ours.codes)
    plain = rtn(weight, 0.0065)
    assert size < encoded_size(plain.codes)
    assert error < 0.5 * relative_error(weight, hessian, plain)


def test_a_higher_price_makes_it_smaller_and_worse() -> None:
    weight, hessian = case(128, 256, 8)
    power, curved = output_power(weight, hessian), curvature(hessian)
    found = [
        round_matrix(weight, curved, factor * power / weight.size) for factor in (1e-4, 1e-3, 1e-2)
    ]
    sizes = [encoded_size(rounded.codes) for rounded in found]
    errors = [relative_error(weight, hessian, rounded) for rounded in found]
    assert sizes == sorted(sizes, reverse=True) and errors == sorted(errors)


def test_one_huge_weight_does_not_coarsen_the_others() -> None:
    weight, hessian = case(64, 128, 11)
    price = 0.002 * output_power(weight, hessian) / weight.size
    before = relative_error(weight, hessian, round_matrix(weight, curvature(hessian), price))
    weight[5, 7] = 100 * np.abs(weight).max()
    rows = np.arange(64) != 5
    rounded = round_matrix(weight, curvature(hessian), price)
    rest = rounding.Rounded(rounded.codes[rows], rounded.scale[rows])
    assert relative_error(weight[rows], hessian, rest) < 1.5 * before
    assert abs(rounded.codes[5, 7] * rounded.scale[5] / weight[5, 7] - 1) < 0.1
