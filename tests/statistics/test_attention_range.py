"""Static scales of quantized attention against sorted values."""

from __future__ import annotations

import numpy as np
import pytest

from ms_quant.attention.dense import attention
from ms_quant.attention.fa_quant import fa_quant
from ms_quant.errors import MsQuantError
from ms_quant.statistics.attention_range import AttentionRange


def slow(x: np.ndarray, ratio: float) -> list[float]:
    """msModelSlim's: of each head the shortest window of sorted values that holds a ratio."""
    found = []
    for head in range(x.shape[1]):
        reach = 0.0
        for item in x[:, head]:
            values = sorted(item.reshape(-1).tolist())
            size = len(values) - int(len(values) * (1 - ratio) + 1e-9)
            starts = range(len(values) - size + 1)
            start = min(starts, key=lambda s: (values[s + size - 1] - values[s], s))
            reach = max(reach, abs(values[start]), abs(values[start + size - 1]))
        found.append(reach / 127)
    return found


def calls(count=3, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        q, k, v = rng.standard_normal((3, 2, 3, 300, 48), np.float32)
        for x in (q, k, v):
            x[1, 2, 5, 7] = 60  # one of 14,400 values
        yield q, k, v


def test_queries_and_keys_leave_out_one_in_ten_thousand_and_values_nothing():
    one, two = AttentionRange(), AttentionRange()
    given = list(calls())
    one.add(*given[0])
    for arrays in given[1:]:
        two.add(*arrays)
    one.merge(two)
    scales = one.scales()
    for number, (found, ratio) in enumerate(zip(scales, (0.9999, 0.9999, 1.0), strict=True)):
        assert found.dtype == np.float32
        assert found.shape == (3, 1)
        expected = slow(np.concatenate([arrays[number] for arrays in given]), ratio)
        np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)
    assert scales[0].max() < 0.1 < 60 / 127 == pytest.approx(float(scales[2][2, 0]))


def test_attention_takes_them():
    """One outlier no longer sets the step of all others of its head."""
    q, k, v = next(calls(1))
    v[1, 2, 5, 7] = 0
    seen = AttentionRange()
    seen.add(q, k, v)
    largest = tuple(np.abs(x).max(axis=(0, 2, 3)) / 127 for x in (q, k, v))
    errors = [
        np.abs(fa_quant(q, k, v, kind="INT8", scales=scales) - attention(q, k, v))[0, 2].mean()
        for scales in (seen.scales(), largest)
    ]
    assert errors[0] < errors[1] / 5


def test_refusals():
    seen = AttentionRange()
    with pytest.raises(MsQuantError, match="no calibration input reached it"):
        seen.scales()
    q, k, v = next(calls(1))
    k[0, 0, 0, 0] = np.nan
    with pytest.raises(MsQuantError, match="k of a calibration input has NaN or inf"):
        seen.add(q, k, v)
    assert not seen.reach
