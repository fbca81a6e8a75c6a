"""Rotary tables against the formulas, evaluated one by one in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ms_quant.models.rope import check_rope, rope_table

HEAD_DIM, MAX_POSITION = 16, 32
POSITIONS = np.arange(20)


def table(kind: str, positions: np.ndarray = POSITIONS, **more):
    rope = check_rope({"rope_type": kind, "rope_theta": 10000.0, **more}, MAX_POSITION, "here")
    return rope_table(rope, HEAD_DIM, positions, MAX_POSITION)


def frequencies(kind: str, positions: np.ndarray = POSITIONS, **more) -> np.ndarray:
    """Read back from the table: at position 1 every angle is in (0, 1]."""
    cos, sin = table(kind, positions, **more)
    return np.arctan2(sin[1], cos[1])[: HEAD_DIM // 2]


def plain(theta: float = 10000.0) -> np.ndarray:
    return np.array([theta ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)])


def test_default_table_holds_cosines_and_sines_twice():
    cos, sin = table("default")
    assert cos.shape == sin.shape == (20, HEAD_DIM)
    assert cos.dtype == sin.dtype == np.float32
    angles = np.tile(POSITIONS[:, None] * plain(), 2)
    # An angle of at most 20 is rounded to float32 once or twice: 20 * 2^-23.
    np.testing.assert_allclose(cos, np.cos(angles), atol=3e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=3e-6)


def test_linear_divides_every_frequency():
    np.testing.assert_allclose(frequencies("linear", factor=4.0), plain() / 4, rtol=1e-6)


def test_dynamic_grows_theta_only_beyond_the_maximum():
    np.testing.assert_allclose(
        frequencies("dynamic", np.arange(32), factor=2.0), plain(), rtol=1e-6
    )
    grown = 10000.0 * (2.0 * 48 / 32 - 1.0) ** (16 / 14)
    np.testing.assert_allclose(
        frequencies("dynamic", np.arange(48), factor=2.0), plain(grown), rtol=1e-6
    )


def test_llama3_keeps_short_waves_divides_long_ones_and_blends_between():
    found = frequencies(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )
    expected = plain() / 8
    expected[0] = 1.0  # wavelength 6.3, below 32 / 4
    share = (32 * plain()[1] / (2 * math.pi) - 1) / 3  # wavelength 19.9, between 8 and 32
    expected[1] = plain()[1] * (share + (1 - share) / 8)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_yarn_ramps_between_its_two_boundaries():
    found = frequencies("yarn", factor=4.0, original_max_position_embeddings=32)
    # The boundary of beta_fast lies below 0; that of beta_slow is at 1.4, rounded up to 2.
    ramp = np.array([0, 0.5, 1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(found, plain() * (1 - ramp) + plain() / 4 * ramp, rtol=1e-6)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"attention_factor": None}, 0.1 * math.log(4) + 1),
        ({"mscale": 2.0}, 0.1 * math.log(4) + 1),
        (
            {"mscale": 2.0, "mscale_all_dim": 0.5},
            (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
        ),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_yarn_scales_cosines_and_sines(more, expected):
    cos, sin = table("yarn", **{"factor": 4.0, **more})
    np.testing.assert_allclose(np.hypot(cos, sin), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["default", "linear"])
def test_a_later_range_is_a_slice_of_the_table(kind):
    """Generation asks for one position after another."""
    whole, part = (table(kind, p, factor=2.0) for p in (np.arange(20), np.arange(13, 17)))
    for full, some in zip(whole, part, strict=True):
        np.testing.assert_array_equal(full[13:17], some)


def test_no_positions_give_empty_tables():
    cos, sin = table("dynamic", np.arange(0), factor=2.0)
    assert cos.shape == sin.shape == (0, HEAD_DIM)
