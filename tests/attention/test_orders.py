"""Grids and the orders of their tokens, against loops over frames, rows and columns."""

from __future__ import annotations

import numpy as np
import pytest

from ms_quant.attention.grid import Clip, TokenGrid
from ms_quant.attention.orders import (
    inverse,
    place,
    raster,
    time_columns,
    time_windows,
    window_sides,
    windows,
)
from ms_quant.errors import MsQuantError

SHAPES = [
    (1, 1, 1),
    (2, 8, 8),
    (3, 16, 24),
    (3, 9, 8),
    (2, 8, 13),
    (4, 11, 21),
    (3, 5, 20),
    (2, 3, 3),
]


def at(clip, t, h, w):
    return (t * clip.height + h) * clip.width + w


def slow_windows(clip):
    whole = clip.height % 8 == 0 and clip.width % 8 == 0
    high, wide = clip.height - clip.height % 8, clip.width - clip.width % 8
    order = []
    for t in range(clip.frames):
        if t == 0 and not whole:
            order += range(clip.frame)
            continue
        for top in range(0, high, 8):
            for left in range(0, wide, 8):
                order += [at(clip, t, top + i, left + j) for i in range(8) for j in range(8)]
        order += [at(clip, t, h, w) for h in range(high, clip.height) for w in range(clip.width)]
        order += [at(clip, t, h, w) for h in range(high) for w in range(wide, clip.width)]
    return order


def slow_time_windows(clip, led):
    high, wide = window_sides(clip.frames - led)
    order = list(range(led * clip.frame))
    for top in range(0, clip.height, high):
        for left in range(0, clip.width, wide):
            for h in range(top, min(top + high, clip.height)):
                for w in range(left, min(left + wide, clip.width)):
                    order += [at(clip, t, h, w) for t in range(led, clip.frames)]
    return order


@pytest.mark.parametrize("shape", SHAPES)
def test_orders_are_the_loops(shape):
    clip = Clip(0, *shape)
    assert windows(clip, True).tolist() == windows(clip, False).tolist() == slow_windows(clip)
    for led in (True, False):
        columns = list(range(led * clip.frame))
        for place_ in range(clip.frame):
            columns += [t * clip.frame + place_ for t in range(led, clip.frames)]
        assert time_columns(clip, led).tolist() == columns
        assert time_windows(clip, led).tolist() == slow_time_windows(clip, led)
    assert raster(clip).tolist() == list(range(clip.tokens))


def test_a_small_frame_with_remainders():
    """9 x 10: one window, then row 8 whole, then columns 8 and 9 of the rows above it."""
    order = windows(Clip(0, 2, 9, 10)) - 90
    assert order[:90].tolist() == list(range(-90, 0))
    assert order[90:100].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]
    assert order[154:164].tolist() == list(range(80, 90))
    assert order[164:168].tolist() == [8, 9, 18, 19]


@pytest.mark.parametrize(
    ("frames", "sides"), [(8, (4, 4)), (7, (4, 5)), (1, (11, 12)), (20, (3, 2)), (500, (1, 1))]
)
def test_windows_over_all_frames_make_about_a_block(frames, sides):
    assert window_sides(frames) == sides


@pytest.mark.parametrize("within", [raster, windows, time_columns, time_windows])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("text", [0, 1, 200])
def test_video_comes_first_and_text_last(within, text_first, text):
    clip_tokens = 3 * 9 * 10
    grid = TokenGrid.of((3, 9, 10), clip_tokens + text, text, text_first)
    placed = place(grid, within)
    assert sorted(placed.order) == list(range(grid.tokens))
    video = placed.order[:clip_tokens] - (text if text_first else 0)
    assert video.tolist() == within(Clip(0, 3, 9, 10), True).tolist()
    assert placed.order[clip_tokens:].tolist() == grid.others.tolist()
    expected = [p < 90 or p >= clip_tokens for p in range(grid.tokens)]
    assert placed.protected.tolist() == expected
    assert place(grid, within, False).protected.tolist() == [
        p >= clip_tokens for p in range(grid.tokens)
    ]


def test_the_inverse_puts_tokens_back():
    order = place(TokenGrid.of((2, 9, 9), 170, 8), windows).order
    np.testing.assert_array_equal(order[inverse(order)], np.arange(170))


def test_each_clip_starts_on_a_fresh_block():
    """Clips of 2 x 90 and 2 x 64 tokens: 76 of the text between and after fill the first gap."""
    spans = [{"start": 5, "latent_shape": [2, 9, 10]}, {"start": 195, "latent_shape": (2, 8, 8)}]
    grid = TokenGrid.of_spans(spans, 400)
    placed = place(grid, windows)
    assert sorted(placed.order) == list(range(400))
    assert placed.order[:180].tolist() == (5 + windows(grid.clips[0])).tolist()
    text = [*range(5), *range(185, 195), *range(323, 400)]
    assert placed.order[180:256].tolist() == text[:76]
    assert placed.order[256:384].tolist() == (195 + windows(grid.clips[1])).tolist()
    assert placed.order[384:].tolist() == text[76:]
    unprotected = {*range(90, 180), *range(256 + 64, 384)}
    assert set(np.flatnonzero(~placed.protected)) == unprotected


def test_too_little_text_between_clips_is_refused():
    spans = [{"start": 0, "latent_shape": [1, 9, 10]}, {"start": 90, "latent_shape": [1, 8, 8]}]
    grid = TokenGrid.of_spans(spans, 160)
    with pytest.raises(MsQuantError, match="6 tokens beside the clips are left to fill 38 places"):
        place(grid, windows)


REFUSED = [
    (
        lambda: TokenGrid.of((2, 3, 4), 25),
        r"latent_shape: 2 x 3 x 4 = 24 tokens and 0 of text, exp",
    ),
    (lambda: TokenGrid.of((2, 3, 4), 24, -1), "expected 24 together"),
    (lambda: TokenGrid.of((2, 3), 6), r"latent_shape: \(2, 3\), expected frames, height and width"),
    (lambda: TokenGrid.of((2, 0, 3), 0), "integers from 1"),
    (lambda: TokenGrid.of((2, 1.5, 2), 6), "integers from 1"),
    (lambda: TokenGrid.of(3, 3), "latent_shape: 3, expected"),
    (lambda: TokenGrid.of_spans([], 4), "video_spans: none"),
    (lambda: TokenGrid.of_spans([{"start": 0}], 4), r"video_spans\[0\]: .*latent_shape"),
    (
        lambda: TokenGrid.of_spans([{"start": 1, "latent_shape": (1, 2, 2)}], 4),
        r"video_spans\[0\]: ends at 5, expected at most 4",
    ),
    (
        lambda: TokenGrid.of_spans(
            [{"start": 0, "latent_shape": (1, 2, 2)}, {"start": 3, "latent_shape": (1, 1, 1)}], 9
        ),
        r"video_spans\[1\]: starts at 3, expected a token from 4",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call, message):
    with pytest.raises(MsQuantError, match=message):
        call()
