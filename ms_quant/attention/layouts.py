"""The two layouts of queries, keys and values, and what may be given as such."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ms_quant.errors import BadArgumentError
from ms_quant.numerics.minifloat import finite_float32

LAYOUTS = ("BNSD", "BSND")  # batch, heads, length, size; batch, length, heads, size


def heads_first(x: np.ndarray, layout: str, name: str = "x") -> np.ndarray:
    """A view of ``x`` as (batch, heads, length, size).

    Raises:
        MsQuantError: the layout is unknown, or ``x`` has not four axes.
    """
    if layout not in LAYOUTS:
        raise BadArgumentError(f"layout: {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if x.ndim != 4:
        raise BadArgumentError(f"{name}: shape {x.shape}, expected four axes in {layout}")
    return x if layout == "BNSD" else x.transpose(0, 2, 1, 3)


def from_heads_first(x: np.ndarray, layout: str) -> np.ndarray:
    """The inverse of :func:`heads_first`."""
    return x if layout == "BNSD" else np.ascontiguousarray(x.transpose(0, 2, 1, 3))


def operands(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, layout: str = "BNSD"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values in float32, heads first.

    Raises:
        MsQuantError: one holds NaN or infinity, has a wrong rank, or does not go with the others.
    """
    arrays = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        arrays.append(heads_first(finite_float32(x, name), layout, name))
    check_operands(*arrays)
    return arrays[0], arrays[1], arrays[2]


def check_operands(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    """Refuses shapes (batch, heads, length, size) that do not go together.

    Raises:
        MsQuantError: names the array, its shape and the shape that was expected.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape:
            raise BadArgumentError(
                f"{name}: shape {x.shape}, expected (batch, heads, length, size), none of them 0"
            )
    expected = (*q.shape[:2], k.shape[2], q.shape[3])
    for name, x in (("k", k), ("v", v)):
        if x.shape != expected:
            raise BadArgumentError(
                f"{name}: (batch, heads, length, size) of {x.shape}, expected {expected} "
                f"as q has {q.shape}"
            )


def scale_of(scale: float | None, size: int) -> float:
    """The factor of scores: the one given, else 1 / sqrt(size).

    Raises:
        MsQuantError: it is not a finite number.
    """
    if scale is None:
        return size**-0.5
    if not np.isfinite(scale):
        raise BadArgumentError(f"scale: {scale}, expected a finite number")
    return float(scale)


def check_kept(kept: np.ndarray | None, batch: int, keys: int) -> np.ndarray | None:
    """A padding mask as bool (batch, keys), true for a token and false for padding.

    Raises:
        MsQuantError: it is not bool, or has another shape.
    """
    if kept is None:
        return None
    mask = np.asarray(kept)
    if mask.dtype != np.bool_ or mask.shape != (batch, keys):
        raise BadArgumentError(
            f"kept: {mask.dtype} of shape {mask.shape}, expected bool ({batch}, {keys})"
        )
    return mask
