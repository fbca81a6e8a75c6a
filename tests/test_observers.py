"""Running statistics against the whole data at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant.errors import MsQuantError
from ms_quant.models.block_spec import CacheSpec
from ms_quant.statistics.observers import ActivationStats, CacheRange, StepStats

PATHS = ("self_attn.k_proj", "self_attn.v_proj")


def split(x: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    return np.split(x, sorted(cut % (len(x) + 1) for cut in cuts))


@given(
    tokens=st.integers(1, 90),
    channels=st.integers(1, 5),
    keep=st.integers(1, 30),
    cuts=st.lists(st.integers(0, 90), max_size=6),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None)
def test_any_batches_give_the_statistics_of_all(tokens, channels, keep, cuts, seed):
    x = np.random.default_rng(seed).standard_normal((tokens, channels)).astype("f4")
    stats = ActivationStats(channels, tokens, keep_rows=keep)
    for batch in split(x, cuts):  # some are empty
        stats.update(batch)
    columns = [[float(row[k]) for row in x] for k in range(channels)]
    assert stats.tokens == tokens
    assert stats.low.tolist() == [min(c) for c in columns]
    assert stats.high.tolist() == [max(c) for c in columns]
    assert stats.absmax.tolist() == [max(map(abs, c)) for c in columns]
    assert stats.low.dtype == stats.high.dtype == stats.absmax.dtype == np.float32
    squares = [math.fsum(v * v for v in c) for c in columns]
    np.testing.assert_allclose(stats.sum_squares, squares, rtol=tokens * 2.0**-53)
    np.testing.assert_allclose(stats.l2_norm, np.sqrt(squares), rtol=2.0**-23)
    stride = math.ceil(tokens / keep)
    kept = [x[t] for t in range(tokens) if t % stride == 0]
    assert len(kept) <= keep
    np.testing.assert_array_equal(stats.rows, kept)


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        (1, [0]),
        (512, list(range(512))),
        (513, list(range(0, 513, 2))),  # one too many: every other one
        (2048, list(range(0, 2048, 4))),
    ],
)
def test_kept_rows(tokens, kept):
    stats = ActivationStats(1, tokens)
    x = np.arange(tokens, dtype=np.float32)[:, None]
    for start in range(0, tokens, 7):
        stats.update(x[start : start + 7])
    assert stats.rows[:, 0].tolist() == kept


def test_leading_axes_are_tokens():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    stats = ActivationStats(4, 6)
    stats.update(x)
    assert stats.tokens == 6
    assert stats.low.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(stats.rows, x.reshape(6, 4))


def test_kept_rows_are_copies():
    x = np.ones((2, 3), np.float32)
    stats = ActivationStats(3, 2)
    stats.update(x)
    x[:] = 7
    assert (stats.rows == 1).all()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_nothing_seen(shape):
    stats = ActivationStats(3, 0)
    stats.update(np.zeros(shape, np.float32))
    assert stats.tokens == 0
    assert stats.rows.shape == (0, 3)
    assert stats.l2_norm.tolist() == [0, 0, 0]


def test_squares_are_summed_in_float64():
    """2**24 + 1 and 1e38 squared are beyond float32."""
    x = np.full((2, 2), 1e38, np.float32)
    x[:, 0] = 4096.0, 1.0
    stats = ActivationStats(2, 2)
    stats.update(x)
    assert stats.sum_squares[0] == 2**24 + 1
    assert stats.sum_squares[1] == pytest.approx(2e76, rel=1e-6)
    assert stats.l2_norm[1] == pytest.approx(np.sqrt(2) * 1e38, rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused_by_name_and_leave_no_trace(bad):
    x = np.ones((4, 3), np.float32)
    x[2, 1] = bad
    stats = ActivationStats(3, 4, name="model.layers.7.o input")
    with pytest.raises(MsQuantError, match=r"^model\.layers\.7\.o input: 1 of 12 values are NaN"):
        stats.update(x)
    assert stats.tokens == 0
    assert stats.rows.shape == (0, 3)


def batches(seed: int) -> list[tuple[int, np.ndarray]]:
    rng = np.random.default_rng(seed)
    made = [(int(rng.integers(0, 3)), rng.standard_normal((n, 5))) for n in (4, 0, 7, 1, 300, 200)]
    return [(step, x.astype("f4")) for step, x in made]


@pytest.mark.parametrize("seed", range(4))
def test_each_step_has_its_range_and_all_share_the_rest(seed):
    options = {"total_tokens": 512, "keep_rows": 40, "with_hessian": True}
    steps, plain = StepStats(5, steps=4, **options), ActivationStats(5, **options)
    apart = [ActivationStats(5, **options) for _ in range(4)]
    for step, x in batches(seed):
        steps.update_step(x, step)
        plain.update(x)
        apart[step].update(x)
    for name in ("low", "high", "sum_squares", "sum_abs", "products", "rows", "absmax", "tokens"):
        np.testing.assert_array_equal(getattr(steps, name), getattr(plain, name), name)
    for t, alone in enumerate(apart):
        np.testing.assert_array_equal(steps.ranges[0][t], alone.low)
        np.testing.assert_array_equal(steps.ranges[1][t], alone.high)
    assert steps.seen_steps == {t for t, alone in enumerate(apart) if alone.tokens}
    np.testing.assert_array_equal(plain.ranges, (plain.low, plain.high))


@pytest.mark.parametrize("seed", range(4))
def test_kept_rows_know_their_step(seed):
    stats = StepStats(5, total_tokens=512, keep_rows=40, steps=3)
    seen = batches(seed)
    for step, x in seen:
        stats.update_step(x, step)
    assert stats.row_steps.shape == (len(stats.rows),)
    for row, t in zip(stats.rows, stats.row_steps, strict=True):
        assert any(step == t and (x == row).all(axis=1).any() for step, x in seen)


def test_a_step_with_nan_leaves_no_trace():
    stats = StepStats(3, total_tokens=4, steps=2, name="a input")
    with pytest.raises(MsQuantError, match=r"^a input: 1 of 3 values are NaN"):
        stats.update_step(np.float32([[1, np.nan, 2]]), 1)
    assert not stats.seen_steps and not len(stats.row_steps)


CACHED = {path: CacheSpec(tap, 15) for path, tap in zip(PATHS, "kv", strict=True)}


def random_heads(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def test_ranges_of_cached_keys_and_values():
    cache = CacheRange("block.", CACHED)
    batches = [(random_heads(i, (2, 3, 4, 5)), random_heads(9 + i, (2, 3, 4, 5))) for i in range(3)]
    for both in batches:
        for path, heads in zip(PATHS, both, strict=True):
            cache.add(path, heads)
    for path, arrays in zip(PATHS, zip(*batches, strict=True), strict=True):
        for head, channel in np.ndindex(3, 5):
            expected = max(float(np.abs(a[:, head, :, channel]).max()) for a in arrays)
            assert cache.absmax[path][head * 5 + channel] == np.float32(expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_cached_values_that_are_not_finite_are_refused_by_name(value):
    values = random_heads(0, (1, 2, 3, 4))
    values[0, 1, 2, 3] = value
    message = r"layers\.4\.self_attn\.v_proj: calibration output: 1 of"
    with pytest.raises(MsQuantError, match=message):
        CacheRange("layers.4.", CACHED).add(PATHS[1], values)
