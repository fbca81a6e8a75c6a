"""Products on AMX against float64, and statistics of columns on every instruction set."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant import kernels
from ms_quant.kernels import native

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler at install time")
with_amx = pytest.mark.skipif(not kernels.has_product(), reason="no AMX")
ISAS = [name for name in native.ISAS if kernels.available() and kernels.has_isa(name)]
SIZES = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 257])
DEPTHS = st.sampled_from([1, 2, 31, 32, 33, 100, 511, 512, 513, 1100])
SPREADS = st.sampled_from([1e-20, 1e-3, 1.0, 1e6, 1e15])
EPSILON = 2.0**-24


def random(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (spread * np.exp(rng.normal(size=shape)) * rng.normal(size=shape)).astype(np.float32)


def cut(x: np.ndarray, bits: int) -> np.ndarray:
    """The same with fewer bits, as weights that were bfloat16 have them."""
    return (x.view(np.uint32) & np.uint32(0xFFFFFFFF << bits & 0xFFFFFFFF)).view(np.float32)


def test_amx_is_used_where_it_is() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "amx_bf16" not in flags or "avx512_bf16" not in flags or not shutil.which("c++"):
        pytest.skip("no AMX, or no compiler")
    able = ["c++", "-mamx-bf16", "-mavx512bf16", "-x", "c++", "-fsyntax-only", "/dev/null"]
    if subprocess.run(able, capture_output=True).returncode:
        pytest.skip("the compiler knows no AMX")
    assert kernels.has_product()


@with_amx
@given(
    rows=SIZES,
    outputs=SIZES,
    inputs=DEPTHS,
    bits=st.sampled_from([0, 8, 16]),
    spread=SPREADS,
    biased=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_product(
    rows: int,
    outputs: int,
    inputs: int,
    bits: int,
    spread: float,
    biased: bool,
    threads: int,
    seed: int,
) -> None:
    x, weight = random((rows, inputs), seed, spread), cut(random((outputs, inputs), seed + 1), bits)
    bias = random((outputs,), seed + 2, spread) if biased else None
    found = kernels.product(x, weight, bias, threads)
    assert found is not None
    wide, added = x.astype(np.float64), 0 if bias is None else bias.astype(np.float64)
    exact = wide @ weight.T.astype(np.float64) + added
    size = np.abs(wide) @ np.abs(weight.T).astype(np.float64) + np.abs(added)
    assert (np.abs(found - exact) <= (inputs + 8) * EPSILON * size).all()


@with_amx
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(513, 70, 40), (40, 2081, 33)])
def test_product_in_several_pieces(rows: int, outputs: int, inputs: int) -> None:
    x, weight = random((rows, inputs), 0), random((outputs, inputs), 1)
    found = kernels.product(x, weight, None, 2)
    exact = x.astype(np.float64) @ weight.T
    size = np.abs(x).astype(np.float64) @ np.abs(weight.T)
    assert (np.abs(found - exact) <= (inputs + 8) * EPSILON * size).all()


@with_amx
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
@pytest.mark.parametrize("place", [(0, 0), (35, 70), (69, 39)])
@pytest.mark.parametrize("which", [0, 1])
def test_product_leaves_what_is_not_finite_to_others(value, place, which) -> None:
    operands = [random((70, 71), 0), random((70, 71), 1)]
    operands[which][place] = value
    assert kernels.product(*operands) is None


@with_amx
@given(
    rows=DEPTHS, columns=SIZES, spread=SPREADS, threads=st.integers(1, 3), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_syrk(rows: int, columns: int, spread: float, threads: int, seed: int) -> None:
    x, before = random((rows, columns), seed, spread), random((columns, columns), seed, spread**2)
    found = before.copy()
    assert kernels.syrk(found, x, threads)
    wide = x.astype(np.float64)
    exact = before + wide.T @ wide
    size = np.abs(before) + np.abs(wide.T) @ np.abs(wide)
    bound = (rows + 8) * EPSILON * size + rows * 1e-37  # subnormal products are lost
    assert (np.tril(np.abs(found - exact)) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@given(
    rows=st.sampled_from([0, 1, 2, 70]),
    columns=st.sampled_from([1, 3, 16, 255, 256, 257, 520]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_column_stats(isa: str, rows: int, columns: int, threads: int, seed: int) -> None:
    x, low = random((rows, columns), seed, 1e10), random((columns,), seed + 1)
    high, squares, sizes = low + 1, np.full(columns, 2.0), np.full(columns, 3.0)
    expected = np.minimum(low, x.min(axis=0, initial=np.inf))
    largest = np.maximum(high, x.max(axis=0, initial=-np.inf))
    assert kernels.column_stats(x, low, high, squares, sizes, threads, isa)
    np.testing.assert_array_equal(low, expected)
    np.testing.assert_array_equal(high, largest)
    wide, bound = x.astype(np.float64), (rows + 2) * 2.0**-53
    np.testing.assert_allclose(squares, 2 + np.square(wide).sum(axis=0), rtol=bound)
    np.testing.assert_allclose(sizes, 3 + np.abs(wide).sum(axis=0), rtol=bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (4, 255), (4, 299)])
def test_column_stats_tell_what_is_not_finite(isa: str, value: float, place) -> None:
    x = random((5, 300), 0)
    x[place] = value
    sums = np.zeros((2, 300), np.float32), np.zeros((2, 300))
    assert not kernels.column_stats(x, *sums[0], *sums[1], isa=isa)
