"""QuantLinear of every scheme against its definition in NumPy, in both phases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Tensor, nn

import ms_quant
from ms_quant.cells import QuantLinear
from ms_quant.errors import MsQuantError
from ms_quant.numerics.activation import ObservedRange, PerToken, PhasedActivation
from ms_quant.numerics.grid import AffineGrid, Grid
from ms_quant.numerics.linear import Kronecker, LowRank, QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.support import SUPPORT, store
from ms_quant.schemes.table import get_scheme

pytestmark = pytest.mark.usefixtures("blocking_mindspore")
DECODER = list(SUPPORT)
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in DECODER),
    ("W8A16", {"group_size": 64, "symmetric": False}),
    ("W4A16", {"group_size": 32}),
    ("W4A8_DYNAMIC", {"group_size": 32}),
]
OUTS, ROWS = 10, 6


def layer(scheme: Scheme, inner: int, bias: bool = True) -> QuantizedLinear:
    rng = np.random.default_rng(inner)
    weight = rng.standard_normal((OUTS, inner), np.float32)
    weight[1] = 0
    seen = ObservedRange(np.full(inner, -3, "f4"), np.full(inner, 2, "f4"), DTYPES["bfloat16"], "x")
    scheme, storage = store(scheme, DTYPES["bfloat16"])
    grid = scheme.weight.fit(weight, "w", storage.scale_dtype)
    offsets = rng.standard_normal(OUTS, np.float32) if bias else None
    return QuantizedLinear(grid.round(weight), grid, offsets, scheme.activation.fit(seen, None))


def tokens(inner: int) -> np.ndarray:
    x = np.random.default_rng(7).standard_normal((2, ROWS // 2, inner), np.float32)
    x[0, 1] = 0
    return x


def assert_computes(linear: QuantizedLinear, x: np.ndarray) -> None:
    for native in (True, False):
        assert_cell_computes(QuantLinear(linear, native=native), linear, x)


def magnitudes(grid: Grid, codes: np.ndarray) -> np.ndarray:
    """Of weights, and of the codes and zero points whose products with scales cancel in them."""
    sizes = np.abs(grid.values(codes))
    if not isinstance(grid, AffineGrid) or grid.format.symmetric:
        return sizes
    shifts = np.abs(grid.zero_point.astype(np.float32) * grid.scale)
    return sizes + 2 * np.repeat(shifts, codes.shape[1] // shifts.shape[1], axis=1)


def assert_cell_computes(cell: QuantLinear, linear: QuantizedLinear, x: np.ndarray) -> None:
    for decode in (False, True):
        found = (cell(Tensor(x), decode) if cell.phased else cell(Tensor(x))).asnumpy()
        expected = linear.forward(x, decode)
        if linear.integer and linear.branch is None:
            np.testing.assert_array_equal(found, expected)
            continue
        # Sums of K float32 products in another order: K * 2**-24 of the sum of magnitudes, twice.
        terms = np.abs(linear.transformed(x)) @ magnitudes(linear.grid, linear.weight).T
        if linear.branch is not None:
            rank = np.abs(x) @ np.abs(linear.branch.l1).T
            terms += rank @ np.abs(linear.branch.l2).T
        bound = 2 * (x.shape[-1] + 40) * 2.0**-24 * (2 * terms + np.abs(expected))
        assert (np.abs(found - expected) <= bound).all()


@pytest.mark.parametrize("inner", [128, 2048])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_equals_the_definition(name: str, options: dict, bias: bool, inner: int) -> None:
    linear = layer(get_scheme(name, **options), inner, bias)
    x = tokens(inner)
    assert_computes(linear, x)
    if isinstance(linear.activation, PhasedActivation):
        assert not np.array_equal(linear.forward(x), linear.forward(x, decode=True))


@pytest.mark.parametrize("name", ["W8A8_DYNAMIC", "W8A16", "W4A4_DYNAMIC", "W4A4_MXFP4"])
def test_smoothing_transform_and_branch(name: str) -> None:
    """Integer outputs are exact after a division and a transform, too."""
    rng, inner = np.random.default_rng(3), 64
    linear = layer(get_scheme(name), inner)
    smooth = np.exp(rng.standard_normal(inner)).astype("f4")
    left, right = (rng.standard_normal((8, 8)).astype("f4") for _ in range(2))
    l1, l2 = rng.standard_normal((4, inner)).astype("f4"), rng.standard_normal((OUTS, 4))
    x = tokens(inner)
    assert_computes(replace(linear, smooth=smooth), x)
    assert_computes(replace(linear, kronecker=Kronecker(left, right)), x)
    assert_computes(replace(linear, smooth=smooth, kronecker=Kronecker(left, right)), x)
    assert_computes(replace(linear, branch=LowRank(l1, l2.astype("f4"))), x)


def test_clipped_tokens() -> None:
    linear = layer(get_scheme("W4A4_DYNAMIC"), 64)
    assert_computes(replace(linear, activation=PerToken(4, 0.7)), tokens(64))


@pytest.mark.parametrize("name", ["W8A16", "W8A8_MXFP8", "W8A8_MIX"])
def test_no_tokens_and_narrow_types(name: str) -> None:
    cell = QuantLinear(layer(get_scheme(name), 64))
    assert cell(Tensor(np.zeros((0, 64), "f4"))).shape == (0, OUTS)
    y = cell(Tensor(tokens(64)).astype(ms.float16))
    assert y.dtype == ms.float16 and y.shape == (2, 3, OUTS)


@pytest.mark.parametrize("name", ["W8A16", "W4A16", "W8A8_PER_CHANNEL", "W8A8_MIX", "W4A4_MXFP4"])
def test_schemes_without_ascend_operators_are_refused_there(name: str) -> None:
    with pytest.raises(MsQuantError, match=r"no Ascend operators here yet, expected W8A8 or"):
        QuantLinear(layer(get_scheme(name), 128), device_target="Ascend")


@pytest.mark.parametrize(
    ("scheme", "algorithm", "options"),
    [
        ("W4A16", "gptq", {"group_size": 32}),
        ("W8A8_DYNAMIC", "smoothquant", {"alpha": 0.8}),
        ("W8A8", "percentile", {"share": 0.99}),
        ("W4A4_MXFP4_SVD", "minmax", {"rank": 2}),
        ("W4A4_FLATQUANT_DYNAMIC", "minmax", {"steps": 2}),
        ("W16A16S", "minmax", {"sparsity": 0.2}),
    ],
)
def test_any_network_takes_any_scheme(scheme: str, algorithm: str, options: dict) -> None:
    rng = np.random.default_rng(0)
    network = nn.SequentialCell(nn.Dense(64, 96), nn.ReLU(), nn.Dense(96, 32))
    x = Tensor(rng.standard_normal((40, 64), np.float32))
    before = network(x).asnumpy()
    network = ms_quant.quantize(network, scheme, calibration=[x], algorithm=algorithm, **options)
    assert isinstance(network[0], QuantLinear) and isinstance(network[2], QuantLinear)
    error = np.linalg.norm(network(x).asnumpy() - before) / np.linalg.norm(before)
    assert error < 0.35
