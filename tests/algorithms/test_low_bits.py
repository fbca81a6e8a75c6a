"""Scales from all but the outliers, against a slow loop over rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ms_quant.algorithms import get_algorithms
from ms_quant.algorithms.low_bits import LowBitsOptions, largest_inlier, solve
from ms_quant.algorithms.problem import Problem, Solution
from ms_quant.errors import MsQuantError
from ms_quant.schemes.table import get_scheme

FLOAT32 = np.dtype(np.float32)
RNG = np.random.default_rng(0)
WEIGHTS = {
    "gaussian": RNG.standard_normal((7, 256)).astype(np.float32),
    "heavy": RNG.standard_t(2, (5, 100)).astype(np.float32),
    "rows of other sizes": (RNG.standard_normal((9, 64)) * np.logspace(-3, 2, 9)[:, None]).astype(
        np.float32
    ),
    "few": RNG.standard_normal((3, 4)).astype(np.float32),
}
OPTIONS = [
    LowBitsOptions(),
    LowBitsOptions(fraction=0.1),
    LowBitsOptions(fraction=0),
    LowBitsOptions(sigma=3.0),
    LowBitsOptions(sigma=4.0, whole=True),
    LowBitsOptions(fraction=0.05, whole=True),
]


def slow(weight: np.ndarray, options: LowBitsOptions) -> list[float]:
    found = []
    for row in weight:
        sizes = [abs(float(value)) for value in row]
        pool = sizes
        if options.whole and not options.sigma:
            pool = [abs(float(value)) for value in weight.ravel()]
        if options.sigma:
            mean = sum(sizes) / len(sizes)
            power = sum((size - mean) ** 2 for size in sizes) / (len(sizes) - 1)
            limit = options.sigma * math.sqrt(power)
        else:
            place = max(1, int(len(pool) * options.fraction))
            limit = sorted(pool, reverse=True)[place - 1]
        found.append(max((size for size in sizes if size <= limit), default=max(sizes)))
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_is_the_slow_loop(name: str, options: LowBitsOptions) -> None:
    weight = WEIGHTS[name]
    assert largest_inlier(weight, options)[:, 0].tolist() == slow(weight, options)


def test_rows_without_inliers_or_without_values() -> None:
    weight = np.array([[0, 0, 0], [2, -2, 2], [5, 1, 1]], np.float32)
    assert largest_inlier(weight, LowBitsOptions(sigma=3))[:, 0].tolist() == [0, 2, 5]
    whole = LowBitsOptions(fraction=0.5, whole=True)  # the fourth largest of nine is 2
    assert largest_inlier(weight, whole)[:, 0].tolist() == [0, 2, 1]
    assert (
        largest_inlier(np.ones((2, 1), np.float32), LowBitsOptions(sigma=3)).tolist() == [[1]] * 2
    )


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_codes_are_steps_of_a_seventh_and_outliers_keep_their_values(options) -> None:
    weight = WEIGHTS["heavy"].copy()
    weight[0, :2] = 400, -400
    problem = Problem("o", get_scheme("W8A8S"), {"w": weight}, {}, None, FLOAT32, lambda c: 0.0)
    solution = solve(problem, Solution(), options)
    scale, codes = solution.grids["w"].scale, solution.codes["w"]
    np.testing.assert_array_equal(scale, largest_inlier(weight, options) / np.float32(7))
    expected = np.clip(np.rint(weight / scale), -127, 127)
    np.testing.assert_array_equal(codes, expected)
    outlier = np.abs(weight) > largest_inlier(weight, options)
    assert (np.abs(codes)[~outlier] <= 7).all()
    if outlier.any():
        assert np.abs(codes)[outlier].min() >= 7 and codes.min() >= -127


def test_a_row_of_zeros_has_a_scale() -> None:
    scheme = get_scheme("W8A8S")
    weight = np.zeros((2, 64), np.float32)
    problem = Problem("o", scheme, {"w": weight}, {}, None, FLOAT32, lambda c: 0.0)
    solution = solve(problem, Solution(), LowBitsOptions())
    assert (solution.grids["w"].scale > 0).all() and not solution.codes["w"].any()


def test_only_its_own_scheme_takes_it() -> None:
    assert get_algorithms("minmax", get_scheme("W8A8S")).names == ("low_bits",)
    with pytest.raises(
        MsQuantError, match="'low_bits' does not work with scheme W8A8: its tensors"
    ):
        get_algorithms("low_bits", get_scheme("W8A8"))
    for other in ("clip", "ssz", "osl", "awq"):
        with pytest.raises(MsQuantError, match=f"'{other}' does not work .* leave out outliers"):
            get_algorithms(other, get_scheme("W8A8S"))
    for wrong in ("fraction=0.6", "fraction=-1", "sigma=-3"):
        name, value = wrong.split("=")
        with pytest.raises(MsQuantError, match=rf"^low_bits\.{name} is "):
            get_algorithms("low_bits", get_scheme("W8A8S"), {f"low_bits.{name}": value})
