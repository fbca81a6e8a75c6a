"""Walsh-Hadamard transforms have the bits of the reference, which tests/numerics proves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant import kernels
from ms_quant.errors import MsQuantError
from ms_quant.kernels import native
from ms_quant.numerics import rotation

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler at install time")


@given(
    rows=st.integers(0, 4),
    power=st.integers(0, 10),
    width=st.sampled_from([1, 2, 3, 4, 12, 20, 28, 37]),
    spread=st.sampled_from([1.0, 1e-310, 1e300]),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_bits_of_the_reference(rows: int, power: int, width: int, spread: float, seed: int) -> None:
    x = spread * np.random.default_rng(seed).standard_normal((rows, 2**power, width))
    x[1:2] = 0
    expected = rotation.sylvester(x, np.sqrt(3))
    found = kernels.sylvester(x.copy(), np.sqrt(3))
    np.testing.assert_array_equal(found.view(np.int64), expected.view(np.int64))


@pytest.mark.parametrize("n", [1, 2, 8, 12, 64, 120, 1536, 4096])
def test_the_whole_transform(n: int) -> None:
    """Against the dense matrix, and bit for bit against the transform in NumPy."""
    x, signs = np.random.default_rng(n).standard_normal((2, 3, n)), rotation.random_signs(n, 3)
    kept = x.copy()
    found = rotation.apply_hadamard(x, "x", signs, kernels.sylvester)
    np.testing.assert_allclose(found, x @ rotation.random_hadamard(n, 3), atol=1e-12, rtol=0)
    np.testing.assert_array_equal(found, rotation.apply_hadamard(x, "x", signs))
    rotation.apply_hadamard(x, "x", stages=kernels.sylvester)
    np.testing.assert_array_equal(x, kept)  # the input is left alone


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    x = np.random.default_rng(0).standard_normal((3, 64, 1))
    x[1, 5] = bad
    found = kernels.sylvester(x, 8.0)
    assert not np.isfinite(found[1]).any() and np.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("shape", [(-1, 2, 1), (1, 0, 1), (1, 3, 1), (1, 2, 0)])
def test_refused_sizes(shape: tuple[int, int, int]) -> None:
    with pytest.raises(MsQuantError, match="an argument is wrong"):
        native.call("msq_hadamard", np.zeros(8).ctypes.data, *shape, 1.0)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((3, 16, 12))
    expected = kernels.sylvester(x.copy(), 4.0)
    monkeypatch.setattr("ms_quant.kernels.hadamard.available", lambda: False)
    np.testing.assert_array_equal(kernels.sylvester(x, 4.0), expected)
