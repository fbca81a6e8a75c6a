"""Rules of sparse attention as data, and the mask that each makes.

================  =============================================  ==============================
kind              what it keeps                                  tokens in the order
================  =============================================  ==============================
``rf_v1``         a band or a checkerboard for each head, ARM    raster or (h w t), by head
``rf_v2``         blocks by mean query and key; those of the     8x8 windows of each frame
                  first of a batch serve all
``rf_v3``         the same for each of a batch                   8x8 windows of each frame
``time_blocks``   the same; ours                                 8x8 windows or columns along
                                                                 time, by head
``ada_bsa``       blocks by antidiagonal sums                    as they come
================  =============================================  ==============================

Sources: RainFusion, arXiv 2505.21036; MindIE-SD's ``sparse_attention`` for rf_v2, rf_v3, ada_bsa.

``sparsity`` is always the share that a rule tries to leave out. What it really leaves out is less
(text, the first frame, whole blocks): ``BlockMask.density`` says it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ms_quant.attention.ada_bsa import BLOCK, ada_bsa_blocks
from ms_quant.attention.arm import ALPHA, FLOOR, MODES, arm
from ms_quant.attention.bands import check_sparsity
from ms_quant.attention.block_attention import BLOCK_SHAPE
from ms_quant.attention.grid import TokenGrid
from ms_quant.attention.layouts import operands
from ms_quant.attention.mask import BlockMask, pick
from ms_quant.attention.orders import ClipOrder, PlacedTokens, place, time_windows, windows
from ms_quant.attention.pooled import pooled_blocks, protect
from ms_quant.attention.recall import ROWS, recall
from ms_quant.errors import BadArgumentError

KINDS = ("rf_v1", "rf_v2", "rf_v3", "time_blocks", "ada_bsa")
SPARSITY = 0.5


@dataclass(frozen=True)
class SparseRule:
    """How the mask of each head is found.

    Attributes:
        kind: of ``KINDS``.
        sparsity: the share of pairs to leave out, 0 to 1.
        block_shape: queries and keys of a block; (128, 256) for rf_v3 in FP8.
        protect_first_frame: keep the first frame of each clip as queries and keys; rf_v1 and rf_v2
            always do.
        mode, alpha, floor, tau, counting: of :func:`~ms_quant.attention.arm.arm`, for rf_v1.
        cdf_threshold, keep_sink, keep_recent: of ada_bsa.
        rows: queries on which the recall of masks is measured, where heads choose.
    """

    kind: str
    sparsity: float = SPARSITY
    block_shape: tuple[int, int] = BLOCK_SHAPE
    protect_first_frame: bool = True
    mode: str = MODES[0]
    alpha: float = ALPHA
    floor: float = FLOOR
    tau: int | None = None
    counting: str = "even"
    cdf_threshold: float = 1.0
    keep_sink: bool = True
    keep_recent: bool = True
    rows: int = ROWS

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadArgumentError(f"kind: {self.kind!r}, expected one of {', '.join(KINDS)}")
        check_sparsity(self.sparsity)
        if self.kind in ("rf_v1", "rf_v2") and not self.protect_first_frame:
            raise BadArgumentError(
                f"protect_first_frame: False with {self.kind}, expected rf_v3 or time_blocks"
            )
        if self.kind == "ada_bsa" and self.block_shape != (BLOCK, BLOCK):
            raise BadArgumentError(
                f"block_shape: {self.block_shape} with ada_bsa, expected {(BLOCK, BLOCK)}"
            )


def make_mask(
    rule: SparseRule,
    q: np.ndarray,
    k: np.ndarray,
    grid: TokenGrid,
    *,
    scale: float | None = None,
    kept: np.ndarray | None = None,
) -> BlockMask:
    """The mask of each head.

    Args:
        q, k: float (batch, heads, tokens, size), as attention takes them.
        grid: which tokens are video.
        kept: bool (batch, tokens), false for keys that are padding.

    Raises:
        MsQuantError: queries, keys and grid do not go together, or the rule takes one clip alone.
    """
    q, k, _ = operands(q, k, k)
    if not q.shape[2] == k.shape[2] == grid.tokens:
        raise BadArgumentError(
            f"grid: {grid.tokens} tokens for {q.shape[2]} queries and {k.shape[2]} keys, "
            "expected as many: self attention"
        )
    if rule.kind == "rf_v1":
        options = {name: getattr(rule, name) for name in ("mode", "sparsity", "alpha", "floor")}
        options |= {"tau": rule.tau, "counting": rule.counting, "rows": rule.rows}
        return arm(q, k, grid, scale=scale, kept=kept, **options).mask
    if rule.kind == "ada_bsa":
        return _antidiagonal(rule, q, k, grid, scale)
    in_windows = _pooled(rule, q, k, grid, windows, "windows", scale)
    if rule.kind != "time_blocks" or all(clip.frames == 1 for clip in grid.clips):
        return in_windows
    along_time = _pooled(rule, q, k, grid, time_windows, "time", scale)
    found = recall(q, k, [in_windows, along_time], rows=rule.rows, scale=scale, kept=kept)
    return pick([in_windows, along_time], found.argmax(axis=0))


def _pooled(
    rule: SparseRule,
    q: np.ndarray,
    k: np.ndarray,
    grid: TokenGrid,
    within: ClipOrder,
    name: str,
    scale: float | None,
) -> BlockMask:
    whole = math.lcm(*rule.block_shape)
    placed = place(grid, within, rule.protect_first_frame, whole)
    if rule.kind == "rf_v2":
        q, k = q[:1], k[:1]
    blocks = pooled_blocks(
        *(q, k, placed.protected, rule.sparsity),
        order=placed.order,
        block_shape=rule.block_shape,
        scale=scale,
    )
    return _mask(placed, blocks, rule.block_shape, name)


def _antidiagonal(
    rule: SparseRule, q: np.ndarray, k: np.ndarray, grid: TokenGrid, scale: float | None
) -> BlockMask:
    blocks = ada_bsa_blocks(
        *(q, k),
        sparsity=rule.sparsity,
        cdf_threshold=rule.cdf_threshold,
        keep_sink=rule.keep_sink,
        keep_recent=rule.keep_recent,
        scale=scale,
    )
    others = np.isin(np.arange(grid.tokens), grid.others)
    placed = PlacedTokens(np.arange(grid.tokens), others)
    return _mask(placed, protect(blocks, others, rule.block_shape), rule.block_shape, "ada_bsa")


def _mask(
    placed: PlacedTokens, blocks: np.ndarray, block_shape: tuple[int, int], name: str
) -> BlockMask:
    heads = blocks.shape[1]
    order_of = np.zeros(heads, np.int64)
    return BlockMask(placed.order[None], order_of, blocks, block_shape, names=(name,) * heads)
