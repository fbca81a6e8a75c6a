"""A mask of blocks as indices: what the operator of rf_v2 on a device is given."""

from __future__ import annotations

import numpy as np

from ms_quant.attention.mask import BlockMask
from ms_quant.errors import BadArgumentError

PADDING = -1


def select_idx(mask: BlockMask) -> tuple[np.ndarray, np.ndarray]:
    """The key blocks that each block of queries keeps, as MindIE-SD's rf_v2 hands them on.

    Queries, keys and values go to the operator in ``mask.orders[0]``, and a batch shares one mask.

    Args:
        mask: of blocks alone, as rf_v2 makes it.

    Returns:
        int64 (query blocks, heads, key blocks): ascending numbers of the blocks that are kept, then
        -1; and int64 (query blocks, heads): how many are kept. Open: int64, as the vendor's pages
        name no type.

    Raises:
        MsQuantError: the mask has several items of a batch, several orders, or a band.
    """
    _check(mask)
    assert mask.blocks is not None
    kept = mask.blocks[0].astype(bool).swapaxes(0, 1)
    index = np.where(kept, np.arange(kept.shape[2]), kept.shape[2])
    index.sort(axis=2)
    index[index == kept.shape[2]] = PADDING
    return index, np.count_nonzero(kept, axis=2).astype(np.int64)


def _check(mask: BlockMask) -> None:
    if mask.blocks is None or mask.band is not None or mask.leading is not None:
        raise BadArgumentError(
            "mask: of bands or of all pairs, expected blocks, as rf_v2 makes them"
        )
    if mask.batch != 1:
        raise BadArgumentError(
            f"mask: of a batch of {mask.batch}, expected one mask for all, as rf_v2 makes it"
        )
    if len(mask.orders) != 1:
        raise BadArgumentError(
            f"mask: {len(mask.orders)} orders of tokens, expected the same for all heads"
        )
