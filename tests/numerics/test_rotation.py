"""Rotations: orthogonality, fast against dense, functions preserved, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant.errors import MsQuantError
from ms_quant.numerics import rotation

ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 44, 48, 56, 60, 68, 76, 84, 104, 108, 120]
ORDERS += [124, 128, 132, 140, 148, 164, 180, 196, 200]
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n", ORDERS)
def test_matrices_are_orthogonal(n):
    matrix = rotation.hadamard(n)
    np.testing.assert_allclose(np.abs(matrix), 1 / np.sqrt(n), rtol=1e-15)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-12, rtol=0)
    signed = rotation.random_hadamard(n, 7)
    np.testing.assert_allclose(signed @ signed.T, np.eye(n), atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", ORDERS)
def test_signs_times_themselves_are_n(n):
    """The same without rounding: a Hadamard matrix has H H^T = n I in integers."""
    signs = np.rint(rotation.hadamard(n) * np.sqrt(n)).astype(np.int64)
    np.testing.assert_array_equal(signs @ signs.T, n * np.eye(n, dtype=np.int64))


def test_golden_matrix():
    """Sylvester's order: H[i, j] = (-1)^popcount(i & j)."""
    expected = [[(-1) ** bin(i & j).count("1") for j in range(16)] for i in range(16)]
    np.testing.assert_array_equal(rotation.hadamard(16) * 4, expected)


def test_the_documented_orders_are_all():
    found = []
    for n in range(1, 201):
        try:
            found += [n] if rotation.base_order(n, "x") == n else []
        except MsQuantError:
            continue
    assert found == [1] + [n for n in ORDERS if n > 8 and n not in (16, 24, 40, 48, 56, 120, 128)]


@pytest.mark.parametrize(
    ("n", "m"),
    [(1536, 12), (2560, 20), (3584, 28), (9728, 76), (11008, 5504), (14336, 28), (25600, 200)],
)
def test_sizes_of_models(n, m):
    assert rotation.base_order(n, "x") == m


@pytest.mark.parametrize("n", [0, -4, 3, 6, 10, 14, 52, 92, 100, 116, 172, 997])
def test_refuses_other_orders_by_name(n):
    with pytest.raises(MsQuantError, match=f"down_proj: no Hadamard matrix of order {n}, expected"):
        rotation.hadamard(n, "down_proj")


@pytest.mark.parametrize("n", ORDERS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3)])
def test_fast_equals_dense(n, shape):
    x = RNG.standard_normal((*shape, n))
    signs = rotation.random_signs(n, 3)
    kept = x.copy()
    for given_signs, dense in [
        (None, rotation.hadamard(n)),
        (signs, rotation.random_hadamard(n, 3)),
    ]:
        found = rotation.apply_hadamard(x, "x", given_signs)
        np.testing.assert_allclose(found, x @ dense, atol=1e-12, rtol=0)
    np.testing.assert_array_equal(x, kept)  # the input is left alone


@pytest.mark.parametrize("n", [12, 64, 120])
def test_rotation_preserves_the_function(n):
    x, weight = RNG.standard_normal((5, n)), RNG.standard_normal((7, n))
    signs = rotation.random_signs(n, 11)
    left, right = (rotation.apply_hadamard(a, "a", signs) for a in (x, weight))
    np.testing.assert_allclose(left @ right.T, x @ weight.T, atol=1e-12 * n, rtol=0)


def test_signs_are_the_same_everywhere():
    """PCG64's raw stream for seed 1234; a change would make other checkpoints."""
    assert rotation.random_signs(12, 1234).tolist() == [-1, 1, -1, 1, 1, 1, 1, 1, -1, 1, 1, -1]
    assert set(rotation.random_signs(200, 0)) == {-1.0, 1.0}
    assert (rotation.random_signs(64, 0) != rotation.random_signs(64, 1)).any()


@pytest.mark.parametrize(
    ("k", "factors"),
    [
        (1024, (32, 32)),
        (1536, (32, 48)),  # a = 40, b = 8
        (2560, (40, 64)),
        (9728, (76, 128)),
        (11008, (86, 128)),
        (18944, (128, 148)),
        (27648, (144, 192)),
        (29568, (168, 176)),
        (8, (2, 4)),
        (4, (2, 2)),
        (15, (3, 5)),
        (7, (1, 7)),
        (1, (1, 1)),
    ],
)
def test_balanced_factors(k, factors):
    assert rotation.balanced_factors(k, "x") == factors


def test_balanced_factors_as_the_source_searches_them():
    """The smallest a >= sqrt(k) with a^2 - k = b^2."""
    for k in range(1, 400):
        squares = ((a - b, a + b) for a in range(1, k + 2) for b in range(a) if a * a - k == b * b)
        expected = next(squares, None)
        if expected is None:
            with pytest.raises(MsQuantError, match=f"x: K = {k} has no factors"):
                rotation.balanced_factors(k, "x")
        else:
            assert rotation.balanced_factors(k, "x") == expected


@settings(max_examples=25, deadline=None)
@given(a=st.integers(1, 6), b=st.integers(1, 6), rows=st.integers(0, 3), seed=st.integers(0, 99))
def test_kronecker_equals_dense_and_preserves_the_function(a, b, rows, seed):
    rng = np.random.default_rng(seed)
    # orthogonal times a diagonal of 1..2: well conditioned, and no inverse of itself
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] * rng.uniform(1, 2, n)
                   for n in (a, b))  # fmt: skip
    x, weight = rng.standard_normal((rows, a * b)), rng.standard_normal((4, a * b))
    found = rotation.apply_kronecker(x, left, right, "x")
    np.testing.assert_allclose(found, x @ np.kron(left, right), atol=1e-12, rtol=0)
    folded = rotation.fold_kronecker(weight, left, right, "w")
    np.testing.assert_allclose(found @ folded.T, x @ weight.T, atol=1e-10, rtol=0)


def test_kronecker_loops():
    """x'[i, j] = sum over p, q of left[p, i] * x[p, q] * right[q, j]."""
    left, right, x = RNG.standard_normal((2, 2)), RNG.standard_normal((3, 3)), np.arange(6.0)
    found = rotation.apply_kronecker(x, left, right, "x").reshape(2, 3)
    for i in range(2):
        for j in range(3):
            total = sum(left[p, i] * x[3 * p + q] * right[q, j] for p in range(2) for q in range(3))
            assert found[i, j] == pytest.approx(total, abs=1e-12)


def test_refusals():
    eye2, eye3 = np.eye(2), np.eye(3)
    with pytest.raises(MsQuantError, match=r"x: Kronecker factors .* for a tensor of \(5,\)"):
        rotation.apply_kronecker(np.ones(5), eye2, eye3, "x")
    with pytest.raises(MsQuantError, match="x: Kronecker factors"):
        rotation.apply_kronecker(np.ones(6), np.ones((2, 3)), eye3, "x")
    with pytest.raises(MsQuantError, match="x: Kronecker factors"):
        rotation.apply_kronecker(np.ones(()), eye2, eye3, "x")
    with pytest.raises(MsQuantError, match="w: a Kronecker factor is singular"):
        rotation.fold_kronecker(np.ones((1, 6)), np.ones((2, 2)), eye3, "w")
    with pytest.raises(MsQuantError, match="x: left: 2 of 4 values are NaN or inf"):
        rotation.apply_kronecker(np.ones(6), np.diag([np.nan, np.inf]), eye3, "x")
    for bad in (np.nan, np.inf):
        with pytest.raises(MsQuantError, match="x: 1 of 4 values are NaN or inf"):
            rotation.apply_hadamard(np.array([1, 2, bad, 3]), "x")
    with pytest.raises(MsQuantError, match="x: no Hadamard matrix of order 0"):
        rotation.apply_hadamard(np.ones(()), "x")
    with pytest.raises(MsQuantError, match=r"x: signs of shape \(1,\), expected \(4,\)"):
        rotation.apply_hadamard(np.ones(4), "x", np.ones(1))
