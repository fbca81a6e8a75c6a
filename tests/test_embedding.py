"""Tables in pieces against whole ones."""

from __future__ import annotations

import numpy as np
import pytest

from ms_quant.embedding import cross_entropy, used_rows


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
