"""The recall window: the range of a head that leaves out the few values that make it wide.

It is msModelSlim's range of quantized attention. Of the values of a head in one calibration window,
in order, it is the shortest stretch that leaves out at most one in so many of them; of several
windows the one that reaches furthest counts.
"""

from __future__ import annotations

import numpy as np


def head_maxima(x: np.ndarray, outside: int) -> np.ndarray:
    """How far the values of heads reach from 0, whole and in recall windows.

    Args:
        x: float32 (windows, heads, tokens, D), finite.
        outside: one in so many values of a head and a window may be left out; 0 for none.

    Returns:
        float32 (2, heads): the largest magnitudes, and those within recall windows.
    """
    found = np.zeros((2, x.shape[1]), np.float32)
    for window in x:
        for head, rows in enumerate(window):
            reach = np.abs(rows).max(initial=0), recall_reach(rows, outside)
            np.maximum(found[:, head], reach, out=found[:, head])
    return found


def recall_reach(rows: np.ndarray, outside: int) -> np.float32:
    """The largest magnitude within the recall window of float32 (tokens, D); of several stretches
    that are equally short, the lowest counts."""
    left_out = rows.size // outside if outside else 0
    if not left_out:
        return np.abs(rows).max(initial=np.float32(0))
    low = -_largest(-rows, left_out + 1)[::-1]
    high = _largest(rows, left_out + 1)
    start = int(np.argmin(high.astype(np.float64) - low))  # so many are left out below
    return max(abs(low[start]), abs(high[start]))


def _largest(rows: np.ndarray, count: int) -> np.ndarray:
    """The largest of all values, ascending: they are in the rows with the largest maxima."""
    if len(rows) > count:
        rows = rows[np.argpartition(rows.max(axis=1), -count)[-count:]]
    values = rows.reshape(-1)
    return np.sort(np.partition(values, -count)[-count:])
