"""Pruning against a plain sort: the exact count, the order, and the ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ms_quant.errors import MsQuantError
from ms_quant.statistics.observers import ActivationStats
from sparse_compress.rate.prune import check_pruning, prune, pruned_count, pruning_transform

MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0, 2.0**-100, -(2.0**127)]),
)
SPARSITIES = st.integers(0, 99).map(lambda percent: percent / 100)


def slow_prune(weight: np.ndarray, count: int, norm: np.ndarray | None) -> np.ndarray:
    """Sorted by (importance, flat index), the first `count` go."""
    scale = np.ones(weight.shape[1], np.float32) if norm is None else norm
    columns = weight.shape[1]
    score = [abs(x) * scale[i % columns] for i, x in enumerate(weight.reshape(-1))]
    order = sorted(range(weight.size), key=lambda i: (score[i], i))
    result = weight.copy()
    for i in order[:count]:
        result.reshape(-1)[i] = 0
    return result


@settings(deadline=None)
@given(MATRICES, SPARSITIES, st.booleans(), st.integers(0, 9))
def test_equals_a_plain_sort(
    weight: np.ndarray, sparsity: float, activation: bool, seed: int
) -> None:
    norm = None
    if activation:
        values = np.array([0, 0.25, 1, 1, 4, 1e6], np.float32)
        norm = np.random.default_rng(seed).choice(values, weight.shape[1])
    before = weight.copy()
    with np.errstate(over="ignore"):
        expected = slow_prune(weight, pruned_count(sparsity, weight.size), norm)
    np.testing.assert_array_equal(prune(weight, sparsity, norm), expected)
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize(
    ("sparsity", "size", "count"),
    [
        (0.5, 7, 3),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999... in binary
        (0.57, 100, 57),
        (0.0, 100, 0),
        (0.999, 1000, 999),
        (1e-9, 1000, 0),
        (1 / 3, 3, 0),  # 0.3333333333333333 is less than a third
    ],
)
def test_count_is_the_floor_of_the_decimal_product(sparsity: float, size: int, count: int) -> None:
    assert pruned_count(sparsity, size) == count


def test_ties_go_by_index_and_exactly_the_count_is_chosen() -> None:
    pruned = prune(np.ones((2, 3), np.float32), 0.5)
    np.testing.assert_array_equal(pruned, [[0, 0, 0], [1, 1, 1]])


def test_zeros_of_the_source_count_among_the_pruned() -> None:
    weight = np.array([[0, 3, 0, 1]], np.float32)
    np.testing.assert_array_equal(prune(weight, 0.5), weight)
    np.testing.assert_array_equal(prune(weight, 0.75), [[0, 3, 0, 0]])


def test_activations_decide_between_kinds() -> None:
    weight = np.array([[1, 2]], np.float32)
    np.testing.assert_array_equal(prune(weight, 0.5), [[0, 2]])
    np.testing.assert_array_equal(prune(weight, 0.5, np.array([3, 1], np.float32)), [[1, 0]])


def test_the_transform_uses_the_norm_of_each_channel() -> None:
    stats = ActivationStats(2, 2)
    stats.update(np.array([[3, 1], [4, 1]], np.float32))
    weight = np.array([[1, 2]], np.float32)
    activation = pruning_transform(0.5, "activation")("any", weight, stats)
    magnitude = pruning_transform(0.5, "magnitude")("any", weight, stats)
    np.testing.assert_array_equal(activation, [[1, 0]])
    np.testing.assert_array_equal(magnitude, [[0, 2]])


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 2.0, float("nan")])
def test_a_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(MsQuantError, match=r"sparsity is .*, expected a number from 0"):
        check_pruning(sparsity, "magnitude")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(MsQuantError, match="pruning 'wanda' is unknown, expected one of"):
        check_pruning(0.5, "wanda")
