"""RainFusion 1: three masks, one of which suits most heads of a video transformer.

=========  ==============================  ===================================================
head       looks at                        mask
=========  ==============================  ===================================================
spatial    its own frame and the next      band |i - j| <= b * n over tokens as they come
temporal   its own place in all frames     the same band over tokens put in order (h w t)
textural   a few keys of each frame        of the keys a checkerboard, the same in every frame
=========  ==============================  ===================================================

b = 1 - sqrt(sparsity), so that a band keeps 1 - (1 - b)^2 = 1 - sparsity of the pairs. The first
frame and all text are kept, as keys and as queries; they are set aside, in front, and n counts the
tokens of the other frames. A checkerboard keeps the places (h, w) with h = w modulo tau, 1 / tau of
the keys; open: the paper's index set for tau above 2 is not unique, this is the diagonal reading.

Source: RainFusion, arXiv 2505.21036, and the class that MindIE's models shipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ms_quant.attention.grid import Clip, TokenGrid
from ms_quant.attention.mask import BlockMask
from ms_quant.attention.orders import raster, time_columns
from ms_quant.errors import BadArgumentError

CLASSES = ("temporal", "spatial", "textural")
COUNTINGS = ("even", "paper", "vendor")
VENDOR_BLOCK = 128


@dataclass(frozen=True)
class Widths:
    """Half widths of the two bands, in places."""

    temporal: int
    spatial: int


def bandwidth(sparsity: float) -> float:
    """b, the half width of a band that leaves out ``sparsity`` of the pairs, as a share of n.

    Raises:
        MsQuantError: the sparsity is not within 0 and 1.
    """
    check_sparsity(sparsity)
    return 1.0 - float(sparsity) ** 0.5


def check_sparsity(sparsity: float) -> None:
    """Refuses a share of pairs left out that is not within 0 and 1."""
    if not 0 <= sparsity <= 1:
        raise BadArgumentError(
            f"sparsity: {sparsity}, expected the share of pairs to leave out, 0 to 1"
        )


def half_widths(clip: Clip, b: float, counting: str = "even") -> Widths:
    """The half widths of both bands.

    Args:
        b: of :func:`bandwidth`.
        counting: "even": b times the tokens beside the first frame. "paper": the spatial band
            counts the first frame, too, and keeps more. "vendor": b rounded to two digits and
            widths to 128s, as the shipped class has it; a frame of few tokens then has no
            temporal band at all.
    """
    if counting not in COUNTINGS:
        raise BadArgumentError(f"counting: {counting!r}, expected {' or '.join(COUNTINGS)}")
    rest = clip.tokens - clip.frame
    if counting != "vendor":
        return Widths(int(b * rest), int(b * (clip.tokens if counting == "paper" else rest)))
    rounded, block = round(b, 2), VENDOR_BLOCK
    temporal = int((rounded * clip.frame) // block * (clip.frames - 1) * block)
    return Widths(temporal, int((rounded * rest) // block * block))


def checkerboard_step(sparsity: float) -> int:
    """tau: the largest that keeps at least 1 - sparsity of the keys, but 2 at least."""
    check_sparsity(sparsity)
    return max(2, int(1 / max(1 - sparsity, 1e-3) + 1e-6))


def band_masks(
    grid: TokenGrid, heads: int, b: float, tau: int = 2, counting: str = "even"
) -> tuple[BlockMask, BlockMask, BlockMask]:
    """The masks of a temporal, a spatial and a textural head, each for all heads.

    Raises:
        MsQuantError: the grid has several clips, or tau is below 2.
    """
    clip = grid.single("RainFusion 1")
    if tau < 2:
        raise BadArgumentError(f"tau: {tau}, expected a step of the checkerboard from 2")
    widths = half_widths(clip, b, counting)
    board = _checkerboard(clip, tau)
    first = len(grid.others) + clip.frame
    local = (time_columns(clip), raster(clip), _board_first(clip, board))
    kept = first + (clip.frames - 1) * int(np.count_nonzero(board))
    bands, leading = (widths.temporal, widths.spatial, -1), (-1, -1, kept)
    masks = [
        BlockMask(
            np.concatenate([grid.others, clip.start + order])[None],
            np.zeros(heads, np.int64),
            band=np.full(heads, band, np.int64),
            first=first,
            leading=np.full(heads, lead, np.int64),
            names=(name,) * heads,
        )
        for name, order, band, lead in zip(CLASSES, local, bands, leading, strict=True)
    ]
    return masks[0], masks[1], masks[2]


def _checkerboard(clip: Clip, tau: int) -> np.ndarray:
    """bool (tokens of a frame,): the keys that are kept."""
    h, w = np.divmod(np.arange(clip.frame), clip.width)
    return h % tau == w % tau


def _board_first(clip: Clip, board: np.ndarray) -> np.ndarray:
    """Frame 0, then the kept keys of the others, then the rest."""
    index = np.arange(clip.tokens).reshape(clip.frames, clip.frame)
    rest = index[1:]
    return np.concatenate([index[0], rest[:, board].ravel(), rest[:, ~board].ravel()])
