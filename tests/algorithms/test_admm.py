"""Pruning against ADMM written row by row, and the cut against the definition of its numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import usual

from ms_quant.algorithms import get_algorithms
from ms_quant.algorithms.admm import cut, protected, pruned
from ms_quant.algorithms.problem import Problem, apply
from ms_quant.errors import MsQuantError
from ms_quant.numerics.storage import DTYPES
from ms_quant.schemes.table import get_scheme
from ms_quant.statistics.observers import ActivationStats

BF16, F16 = DTYPES["bfloat16"], DTYPES["float16"]


def oracle(weight: np.ndarray, hessian: np.ndarray, sparsity: float) -> np.ndarray:
    """float64; each row's least squares problem is solved anew in each of the 20 steps."""
    out, columns = weight.shape
    norm = [math.sqrt(hessian[j, j]) + 1e-8 for j in range(columns)]
    h = np.array(
        [[hessian[i, j] / norm[i] / norm[j] for j in range(columns)] for i in range(columns)]
    )
    h += 0.1 * np.trace(h) / columns * np.eye(columns)
    start = weight.astype(np.float64) * norm
    w, u, kept = start.copy(), np.zeros_like(start), set()
    for step in range(20):
        if step < 15:
            places = [(abs(w[i, j] + u[i, j]), i, j) for i in range(out) for j in range(columns)]
            kept = {place[1:] for place in sorted(places)[int(sparsity * len(places)) :]}
        z = np.zeros_like(w)
        for i, j in kept:
            z[i, j] = w[i, j] + u[i, j]
        u = u + w - z
        for i in range(out):  # least (w - start) h (w - start)^T + |w - z + u|^2
            right = h @ start[i] + z[i] - u[i]
            w[i] = np.linalg.solve(h + np.eye(columns), right)
    result = np.zeros_like(w)
    for i, j in kept:
        result[i, j] = (w[i, j] + u[i, j]) / norm[j]
    return result


def case(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight and correlated inputs, some far larger than others."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * columns, columns)) @ rng.normal(size=(columns, columns))
    x *= np.exp(rng.normal(size=columns))
    return rng.normal(size=(rows, columns)).astype(np.float32), x.astype(np.float32)


def gram(x: np.ndarray) -> np.ndarray:
    return x.T @ x / np.float32(len(x))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (8, 1), (7, 13), (24, 40)])
def test_agrees_with_the_oracle(shape: tuple[int, int], sparsity: float) -> None:
    weight, x = case(*shape, seed=shape[1])
    found, expected = pruned(weight, gram(x), sparsity), oracle(weight, gram(x), sparsity)
    np.testing.assert_array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())
    assert np.count_nonzero(found == 0) == int(sparsity * weight.size)


def test_makes_up_for_what_it_prunes() -> None:
    """Better than dropping the smallest weights, by magnitude or by what they contribute."""
    weight, x = case(64, 96)
    hessian = gram(x)
    contribution = np.abs(weight) * np.sqrt(np.diagonal(hessian))
    errors = []
    for by in (np.abs(weight), contribution):
        dropped = weight * (by > np.quantile(by, 0.5))
        errors.append(np.linalg.norm(x @ (dropped - weight).T))
    found = np.linalg.norm(x @ (pruned(weight, hessian, 0.5) - weight).T)
    assert found < 0.7 * min(errors)


def test_nothing_to_prune_leaves_the_weight() -> None:
    weight, x = case(5, 11)
    np.testing.assert_allclose(pruned(weight, gram(x), 0.0), weight, rtol=1e-4, atol=1e-4)


def test_inputs_that_are_always_zero_go_first() -> None:
    weight, x = case(6, 20)
    x[:, [3, 8, 15]] = 0
    found = pruned(weight, gram(x), 0.15)
    assert np.isfinite(found).all()
    assert (found[:, [3, 8, 15]] == 0).all() and np.count_nonzero(found == 0) == 18
    silent = pruned(weight, np.zeros((20, 20), np.float32), 0.5)
    assert np.isfinite(silent).all() and np.count_nonzero(silent == 0) == 60


def test_without_rows_there_is_nothing_to_do() -> None:
    _, x = case(1, 4)
    assert pruned(np.zeros((0, 4), np.float32), gram(x), 0.3).shape == (0, 4)


def nearest(value: float) -> float:
    """Half to even on a step of a quarter of the binade, of 2**-16 at least; at most 57,344."""
    exponent = max(math.frexp(value)[1] - 1, -14)
    step = Fraction(2) ** (exponent - 2)
    return float(max(min(round(Fraction(value) / step) * step, 57344), -57344))


@given(st.floats(-65504, 65504, width=32))
def test_a_cut_weight_is_the_nearest_of_two_mantissa_bits(value: float) -> None:
    assert float(cut(np.float32([value]))[0]) == nearest(value)


@given(st.integers(-(2**18), 2**18))
def test_cut_near_zero(sixteenths: int) -> None:
    value = float(np.float32(sixteenths * 2.0**-20))
    assert float(cut(np.float32([value]))[0]) == nearest(value)


def test_a_cut_float16_has_an_empty_lower_byte() -> None:
    weight = np.random.default_rng(0).normal(0, 0.02, 4096).astype(np.float32)
    assert not (cut(weight).astype(np.float16).view(np.uint16) & 255).any()


def test_what_would_change_the_output_most_is_protected() -> None:
    weight, x = case(10, 30)
    hessian = gram(x)
    change = np.abs(weight - cut(weight)) * np.sqrt(np.square(x).mean(axis=0))
    chosen = protected(weight, hessian)
    assert np.count_nonzero(chosen) == 6  # 2 % of 300
    assert change[chosen].min() >= change[~chosen].max()


def problem(dtype: np.dtype, scale: float = 1.0) -> Problem:
    weight, x = case(24, 40)
    stats = ActivationStats(40, len(x), with_hessian=True)
    stats.update(x)
    weights = {"q": weight * np.float32(scale), "k": -2 * weight[:7] * np.float32(scale)}
    scheme, scales = usual("W16A16S")
    return Problem("block", scheme, weights, {}, stats, dtype, lambda c: 0.0, scale_type=scales)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_a_group_of_linears(dtype: np.dtype) -> None:
    given = problem(dtype)
    algorithms = get_algorithms("minmax", given.scheme, {"sparsity": 0.4})
    assert algorithms.name == "admm"
    made = apply(given, algorithms.solve(given))
    hessian = given.seen.hessian
    for name, weight in given.weights.items():
        values = made[name].float_weight()
        np.testing.assert_array_equal(values, values.astype(dtype).astype(np.float32))
        exact = pruned(weight, hessian, 0.4)
        full = values != cut(values)
        assert np.count_nonzero(full) <= int(0.02 * weight.size)
        expected = np.where(protected(exact, hessian), exact.astype(dtype), cut(exact))
        np.testing.assert_array_equal(values, expected.astype(np.float32))
        assert np.count_nonzero(values == 0) >= int(0.4 * weight.size)


def test_a_weight_that_float16_cannot_hold_is_refused() -> None:
    given = problem(F16, 1e6)
    with pytest.raises(MsQuantError, match=r"^q in float16: \d+ of 960 values are NaN or inf"):
        apply(given, get_algorithms("admm", given.scheme).solve(given))


@pytest.mark.parametrize(
    ("text", "scheme", "settings", "message"),
    [
        ("admm", "W8A16", {}, "'admm' does not work with scheme W8A16: its tensors have no place"),
        ("gptq", "W16A16S", {}, "'gptq' does not work with scheme W16A16S: its weights are float"),
        ("admm", "W16A16S", {"sparsity": 0.8}, r"^admm\.sparsity is 0\.8: .* less than or equal"),
    ],
)
def test_refused(text: str, scheme: str, settings: dict, message: str) -> None:
    with pytest.raises(MsQuantError, match=message):
        get_algorithms(text, get_scheme(scheme), settings)
