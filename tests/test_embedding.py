"""Tables in pieces against whole ones."""

from __future__ import annotations

import numpy as np
import pytest

from ms_quant import kernels
from ms_quant.models.embedding import Table, cross_entropy, used_rows


def pieces(table: np.ndarray, size: int):
    return ((start, table[start : start + size]) for start in range(0, len(table), size))


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_used_rows(size):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((20, 3)).astype("f4")
    ids = rng.choice([0, 2, 3, 11, 19], (4, 5))
    found = used_rows(pieces(table, size), ids)
    assert np.array_equal(found(ids), table[ids])
    assert np.array_equal(found(ids[1]), table[ids[1]])


@pytest.mark.parametrize("size", [1, 4, 7, 100])
@pytest.mark.parametrize("logit_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("scale", [1, 300])
def test_cross_entropy_is_that_of_whole_logits_in_float64(size, logit_bytes, scale):
    rng = np.random.default_rng(1)
    head = rng.standard_normal((18, 5)).astype("f4") * scale
    rows = rng.standard_normal((11, 5)).astype("f4")
    targets = rng.integers(0, 18, 11)
    wide = rows.astype("f8") @ head.T.astype("f8")
    wide -= wide.max(axis=1, keepdims=True)
    expected = np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(11), targets]
    found = cross_entropy(pieces(head, size), rows, targets, logit_bytes)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("exact", [True, False])
def test_a_table_in_memory(exact):
    """In bfloat16 it takes half the memory, where that loses nothing."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 24)).astype("f4")
    if exact:
        rows = (rows.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    table, x, ids = Table(rows), rng.standard_normal((2, 24)).astype("f4"), np.array([3, 0, 3, 49])
    np.testing.assert_array_equal(table.rows(ids), rows[ids])
    assert table.rows(ids).dtype == np.float32
    np.testing.assert_allclose(table.matmul(x), x @ rows.T.astype(float), rtol=1e-4, atol=1e-5)
    narrow = exact and kernels.available()
    assert table._held.nbytes == rows.nbytes // (2 if narrow else 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_odd_numbers_of_a_table_stay(value):
    rows = np.zeros((4, 8), np.float32)
    rows[2, 5] = value
    np.testing.assert_array_equal(Table(rows).rows(np.arange(4)), rows)
