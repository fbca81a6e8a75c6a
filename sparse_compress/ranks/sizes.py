"""How large the compressed linears of a checkpoint are, from their indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

CODED_BIT = 1 << 15
Coded = tuple[dict[str, Any], Callable[[], np.ndarray]]
"""The sizes of a compressed linear, and what decodes it."""


def linear_sizes(
    layer: str, rank: int, shape: list[int], raw: int, length: int, index: NDArray[np.int8]
) -> dict[str, Any]:
    """The sizes of a compressed linear, from its index."""
    records = index.view("<u8")
    stored = length + records.nbytes
    coded = int(np.count_nonzero(records & np.uint64(CODED_BIT)))
    return {
        "layer": layer,
        "rank": rank,
        "shape": shape,
        "raw_bytes": raw,
        "stored_bytes": stored,
        "ratio": stored / raw,
        "tiles": records.size,
        "bypass_tiles": records.size - coded,
    }


def totals(sizes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    raw = sum(row["raw_bytes"] for row in sizes)
    stored = sum(row["stored_bytes"] for row in sizes)
    return {"raw_bytes": raw, "stored_bytes": stored, "ratio": stored / raw if raw else 1.0}
