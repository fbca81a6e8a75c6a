"""In which order tokens are put before attention is cut into blocks or bands.

An order is int64: ``order[p]`` is the token at place p. Of a clip's own tokens:

=============  ==================================================================================
raster         as they come: frame by frame, row by row
windows        frame by frame, 8x8 windows (rf_v2, rf_v3); a block of 128 is two windows
time_columns   (h w t): all frames of a place, then the next place; RainFusion 1, temporal heads
time_windows   all frames of a small window, then the next window: a block is a column of video
=============  ==================================================================================

A temporal head looks at the same place in all frames. Windows of one frame cannot hold that:
blocks that run along time can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ms_quant.attention.grid import Clip, TokenGrid
from ms_quant.errors import UnsupportedError

WINDOW = 8
BLOCK = 128

ClipOrder = Callable[[Clip, bool], np.ndarray]  # clip, whether frame 0 leads -> local tokens


@dataclass(frozen=True)
class PlacedTokens:
    """Tokens in an order.

    Attributes:
        order: int64 (tokens,), the token at each place.
        protected: bool (tokens,), true at places whose block must be computed whole: what is no
            video, and the first frames where these are protected.
    """

    order: np.ndarray
    protected: np.ndarray


def inverse(order: np.ndarray) -> np.ndarray:
    """The place of each token."""
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return places


def raster(clip: Clip, first_frame_leads: bool = True) -> np.ndarray:
    return np.arange(clip.tokens)


def windows(clip: Clip, first_frame_leads: bool = True) -> np.ndarray:
    """8x8 windows of each frame, as rf_v2 and rf_v3 take them.

    With whole windows: (f hn 8 wn 8) -> (f hn wn 8 8). With a remainder frame 0 stays as it is; in
    each other frame the windows come first, then the rows below them over the full width, then
    what is right of them. Open: that the remainders follow in each frame, not after all frames.
    """
    index = np.arange(clip.tokens).reshape(clip.frames, clip.height, clip.width)
    high, wide = (side - side % WINDOW for side in (clip.height, clip.width))
    main = index[:, :high, :wide]
    main = main.reshape(clip.frames, high // WINDOW, WINDOW, wide // WINDOW, WINDOW)
    main = main.transpose(0, 1, 3, 2, 4).reshape(clip.frames, -1)
    if high == clip.height and wide == clip.width:
        return main.ravel()
    below = index[:, high:].reshape(clip.frames, -1)
    right = index[:, :high, wide:].reshape(clip.frames, -1)
    frames = np.concatenate([main, below, right], axis=1)
    return np.concatenate([index[0].ravel(), frames[1:].ravel()])


def time_columns(clip: Clip, first_frame_leads: bool = True) -> np.ndarray:
    """(h w t); frame 0 as a whole before it, where it leads."""
    led = int(first_frame_leads)
    index = np.arange(clip.tokens).reshape(clip.frames, clip.frame)
    return np.concatenate([index[:led].ravel(), index[led:].T.ravel()])


def time_windows(clip: Clip, first_frame_leads: bool = True, block: int = BLOCK) -> np.ndarray:
    """All frames of a small window, window by window; frame 0 before it, where it leads.

    A window is as large as makes about one block over all frames, and as square as can be. Windows
    at the lower and right end may be smaller.
    """
    led = int(first_frame_leads)
    index = np.arange(clip.tokens).reshape(clip.frames, clip.height, clip.width)
    high, wide = window_sides(clip.frames - led, block)
    t, h, w = np.indices((clip.frames - led, clip.height, clip.width))
    by = np.lexsort([x.ravel() for x in (t, w, h, w // wide, h // high)])
    return np.concatenate([index[:led].ravel(), index[led:].ravel()[by]])


def window_sides(frames: int, block: int = BLOCK) -> tuple[int, int]:
    """Height and width of the window whose column over ``frames`` is nearest to a block."""
    area = max(1.0, block / max(1, frames))
    high = max(1, round(area**0.5))
    return high, max(1, round(area / high))


def place(
    grid: TokenGrid, within: ClipOrder, protect_first_frame: bool = True, block: int = BLOCK
) -> PlacedTokens:
    """All tokens: the clips, each in the order ``within`` and on fresh blocks, then the others.

    Tokens that are no video fill the gap between a clip's end and the next block, in their order
    (open: which ones the vendor takes).

    Args:
        block: what clips begin at multiples of.

    Raises:
        MsQuantError: there are too few of them to fill the gaps.
    """
    others, used = grid.others, 0
    order: list[np.ndarray] = []
    protected = np.ones(grid.tokens, bool)
    placed = 0
    for clip in grid.clips:
        gap = -placed % block
        if gap > len(others) - used:
            raise UnsupportedError(
                f"video_spans: {len(others) - used} tokens beside the clips are left to fill {gap} "
                "places, expected enough that each clip starts on a block; use dense attention"
            )
        order.append(others[used : used + gap])
        used, placed = used + gap, placed + gap
        order.append(clip.start + within(clip, protect_first_frame))
        begin = placed + (clip.frame if protect_first_frame else 0)
        placed += clip.tokens
        protected[begin:placed] = False
    order.append(others[used:])
    return PlacedTokens(np.concatenate(order), protected)
