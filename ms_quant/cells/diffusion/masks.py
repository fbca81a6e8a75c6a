"""Masks of attention as networks give them."""

from __future__ import annotations

import numpy as np

HIDDEN = -1e4
"""What is added to scores of padding, or less: exp of it is 0 in float32."""


def padding(mask: np.ndarray | None, batch: int, keys: int) -> tuple[np.ndarray | None, bool]:
    """A mask as the keys that it keeps, where it says nothing else.

    Args:
        mask: bool, true where a key counts, or float, added to scores; broadcasts to (batch, heads,
            queries, keys).

    Returns:
        bool (batch, keys), or None where all are kept; and whether that is all that the mask says.
    """
    if mask is None:
        return None, True
    shape = np.broadcast_shapes((1, 1, 1, 1), mask.shape)
    full = mask.reshape(shape)
    first = full[:, :1, :1]
    if not np.array_equal(full, np.broadcast_to(first, shape)):
        return None, False
    kept = first[:, 0, 0] if first.dtype == np.bool_ else first[:, 0, 0] > HIDDEN
    if first.dtype != np.bool_ and first[:, 0, 0][kept].any():
        return None, False
    found = np.broadcast_to(kept, (batch, keys))
    return (None if found.all() else np.ascontiguousarray(found)), True
