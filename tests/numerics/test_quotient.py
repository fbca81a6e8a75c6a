"""Input scales by which a norm's gain is divided nearly exactly."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ms_quant.numerics.activation import static_activation
from ms_quant.numerics.quotient import STEPS, ChannelRange, nearly_exact, quotient_error

BF16 = np.dtype(ml_dtypes.bfloat16)
WIDE = ChannelRange(np.full(4096, -0.01, "f4"), np.full(4096, 0.01, "f4"), 0)


def random(seed: int, mean: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(mean, 0.5, 4096)).astype(BF16)


def slow(scale: float, gain: float, low: float, high: float, offset: int) -> float:
    """Every value up to eight steps away, nearest first, by hand."""
    bits = int(np.array(scale, BF16).view(np.uint16))
    best, least = scale, np.inf
    for step in sorted(range(-STEPS, STEPS + 1), key=abs):
        near = float(np.array(bits + step, np.uint16).view(BF16))
        codes = [round(low / near) + offset, round(high / near) + offset]
        if step and not (codes[0] >= -128 and codes[1] <= 127):
            continue
        exact = gain / near
        error = abs(float(np.array(exact, np.float32).astype(BF16)) / exact - 1) if exact else 0
        if error < least:
            best, least = near, error
    return best


def test_it_is_the_best_of_the_values_nearby():
    gain, scale = random(0, 0).astype("f4"), random(1, -3)
    span = scale.astype("f4") * np.float32(127)
    seen = ChannelRange(-span, span / 2, 0)  # which some smaller scales would clip
    found = nearly_exact(scale, gain, BF16, seen).astype("f4")
    for i in range(200):
        expected = slow(*map(float, (scale[i], gain[i], seen.low[i], seen.high[i])), 0)
        assert found[i] == expected, i
    assert (np.rint(seen.low / found) >= -128).all()


def test_quotients_are_eight_times_as_exact_and_scales_stay_where_they_are():
    gain, scale = random(0, 0).astype("f4"), random(1, -3)
    found = nearly_exact(scale, gain, BF16, WIDE).astype("f4")
    before = quotient_error(gain, scale.astype("f4"), BF16)
    after = quotient_error(gain, found, BF16)
    assert (after <= before).all()
    assert np.sqrt(np.mean(before**2)) > 1.6e-3 and np.sqrt(np.mean(after**2)) < 2.5e-4
    moved = found / scale.astype("f4")
    assert np.abs(moved - 1).max() <= 0.0625 and abs(np.log(moved).mean()) < 0.01


@pytest.mark.parametrize("gain", [0.0, 1.0, -1.5])
def test_gains_of_any_sign(gain):
    gains = np.full(4096, gain, "f4")
    found = nearly_exact(random(1, -3), gains, BF16, WIDE).astype("f4")
    assert (quotient_error(gains, found, BF16) <= 2**-9).all() and (found > 0).all()
    if gain == 0:
        np.testing.assert_array_equal(found, random(1, -3).astype("f4"))


def test_static_parameters_never_clip_what_was_seen():
    rng, gain = np.random.default_rng(2), random(0, 0).astype("f4")
    x = rng.normal(size=(64, 4096)).astype("f4") * gain
    low, high = x.min(axis=0), x.max(axis=0)
    for smooth in (None, random(3, 0).astype("f4")):
        found = static_activation(low, high, smooth, BF16, "x", gain)
        plain = static_activation(low, high, smooth, BF16, "x")
        assert (found.scale, found.offset) == (plain.scale, plain.offset)
        ends = np.rint(np.stack([low, high]) / found.input_scale) + found.offset
        assert ends.min() >= -128 and ends.max() <= 127
        assert quotient_error(gain, found.input_scale, BF16).max() < 2.5e-3
