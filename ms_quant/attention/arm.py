"""ARM: which of RainFusion 1's masks each head gets, decided on its queries and keys.

========  ======================================================================  ==============
mode      rule                                                                    source
========  ======================================================================  ==============
``arm2``  temporal if R_t > 0.95 or R_t > R_s, else spatial                       shipped code
``arm3``  temporal if R_t >= alpha, else spatial if R_s >= alpha, else textural   paper
``plus``  the narrowest band of 0.125, 0.25 and 0.5 with R >= alpha, else as      RainFusion+
          ``best`` at the widest
``best``  the mask with the largest R, and dense where that is below the floor    ours
========  ======================================================================  ==============

R is the recall of a mask: the share of a head's probability that it keeps. ``arm2`` and ``arm3``
estimate it on two samples of a frame's size (:func:`sampled_recall`), the others on some queries
over all keys (:func:`recall`). In a network where few heads reach alpha the paper's rule sends the
others to the checkerboard unseen: on a small video model that was 8 dB worse than the shipped rule.
Hence ours. Open: alpha is not printed in the paper; the floor is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ms_quant.attention.bands import CLASSES, band_masks, bandwidth, checkerboard_step
from ms_quant.attention.grid import TokenGrid
from ms_quant.attention.mask import BlockMask, dense_mask, pick
from ms_quant.attention.recall import ROWS, recall, sampled_recall
from ms_quant.errors import BadArgumentError

MODES = ("best", "arm2", "arm3", "plus")
ALPHA = 0.9
FLOOR = 0.8
WIN_RATIO = 0.95  # of the shipped code
PLUS_BANDWIDTHS = (0.125, 0.25, 0.5)
TEMPORAL, SPATIAL, TEXTURAL, DENSE = range(4)


@dataclass(frozen=True)
class HeadMasks:
    """What ARM decided.

    Attributes:
        mask: of all heads; ``mask.names`` are temporal, spatial, textural or dense.
        recall: float64 (heads, 3), estimates for temporal, spatial and textural; NaN where the
            mode does not ask.
        bandwidth: float64 (heads,), b of each head's band; NaN without one.
    """

    mask: BlockMask
    recall: np.ndarray
    bandwidth: np.ndarray

    @property
    def classes(self) -> tuple[str, ...]:
        """temporal, spatial, textural or dense, of each head."""
        return self.mask.names


def arm(
    q: np.ndarray,
    k: np.ndarray,
    grid: TokenGrid,
    *,
    mode: str = "best",
    sparsity: float = 0.5,
    alpha: float = ALPHA,
    floor: float = FLOOR,
    tau: int | None = None,
    counting: str = "even",
    scale: float | None = None,
    kept: np.ndarray | None = None,
    rows: int = ROWS,
) -> HeadMasks:
    """Chooses the mask of each head.

    With one frame there is nothing to leave out: all heads are dense.

    Args:
        q, k: float32 (batch, heads, tokens, size); one choice serves the batch.
        sparsity: share of pairs that bands leave out; mode ``plus`` has widths of its own.
        alpha: recall that ``arm3`` and ``plus`` ask for.
        floor: recall below which ``best`` and ``plus`` leave a head dense.
        tau: of the checkerboard; None takes it from the sparsity.
        counting: of :func:`~ms_quant.attention.bands.half_widths`.
        kept: bool (batch, tokens), false for keys that are padding.
        rows: queries that ``best`` and ``plus`` look at.

    Raises:
        MsQuantError: the mode is unknown, or the grid has several clips.
    """
    if mode not in MODES:
        raise BadArgumentError(f"mode: {mode!r}, expected one of {', '.join(MODES)}")
    clip, heads = grid.single("RainFusion 1"), q.shape[1]
    step, b = checkerboard_step(sparsity) if tau is None else tau, bandwidth(sparsity)
    if clip.frames == 1:
        unknown = np.full((heads, 3), np.nan)
        return HeadMasks(dense_mask(grid.tokens, heads), unknown, unknown[:, 0])
    if mode in ("arm2", "arm3"):
        found = sampled_recall(q, k, clip, b if mode == "arm3" else round(b, 2), scale)
        table = np.concatenate([found, np.full((1, heads), np.nan)]).T
        choice = _shipped(table) if mode == "arm2" else _paper(table, alpha)
        masks = band_masks(grid, heads, b, step, counting)
        return HeadMasks(pick(masks, choice), table, np.where(choice < TEXTURAL, b, np.nan))
    widths = PLUS_BANDWIDTHS if mode == "plus" else (b,)
    sets = [band_masks(grid, heads, width, step, counting) for width in widths]
    every = [mask for masks in sets for mask in masks]
    tables = recall(q, k, every, rows=rows, scale=scale, kept=kept)
    return _narrowest(every, tables.reshape(len(widths), 3, heads), widths, alpha, floor)


def _shipped(table: np.ndarray) -> np.ndarray:
    temporal, spatial = table[:, TEMPORAL], table[:, SPATIAL]
    return np.where((temporal > WIN_RATIO) | (temporal > spatial), TEMPORAL, SPATIAL)


def _paper(table: np.ndarray, alpha: float) -> np.ndarray:
    otherwise = np.where(table[:, SPATIAL] >= alpha, SPATIAL, TEXTURAL)
    return np.where(table[:, TEMPORAL] >= alpha, TEMPORAL, otherwise)


def _narrowest(
    masks: list[BlockMask],
    tables: np.ndarray,
    widths: tuple[float, ...],
    alpha: float,
    floor: float,
) -> HeadMasks:
    """Of each head the first width whose better band reaches alpha, else the best at the last."""
    heads, last = tables.shape[2], len(widths) - 1
    choice, level = np.empty(heads, np.int64), np.empty(heads, np.int64)
    for head in range(heads):
        enough = np.flatnonzero(tables[:last, :TEXTURAL, head].max(axis=1) >= alpha)
        level[head] = enough[0] if len(enough) else last
        among = TEXTURAL if len(enough) else len(CLASSES)
        best = tables[level[head], :among, head]
        choice[head] = best.argmax() if best.max() >= floor else DENSE
    dense = dense_mask(masks[0].tokens, heads)
    number = np.where(choice == DENSE, len(masks), level * len(CLASSES) + choice)
    b = np.where(choice < TEXTURAL, np.array(widths)[level], np.nan)
    return HeadMasks(pick([*masks, dense], number), tables[level, :, np.arange(heads)], b)
