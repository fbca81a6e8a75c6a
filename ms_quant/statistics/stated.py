"""What a file states of statistics, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, short

KINDS = {
    int: "an integer",
    str: "a string",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
LARGEST = 1 << 53


def fact(
    facts: Mapping[str, Any], name: str, kind: type = object, low: int = 0, high: int = LARGEST
) -> Any:
    """A JSON value by its name.

    Args:
        facts: where it is.
        name: its name.
        kind: its type; ``object`` for any.
        low, high: the limits of an integer.

    Raises:
        MsQuantError: it is missing, of another type, or beyond the limits.
    """
    value = facts.get(name, ...)
    if value is ... or (kind is not object and type(value) is not kind):
        found = "missing" if value is ... else f"is {short(value, 80)}"
        raise BadFileError(f"{name}: {found}, expected {KINDS.get(kind, 'a value')}")
    if kind is int and not low <= value <= high:
        raise BadFileError(f"{name}: is {short(value, 80)}, expected {low} to {high}")
    return value


def array(
    arrays: Mapping[str, np.ndarray],
    name: str,
    dtype: type,
    shape: tuple[int | None, ...],
    *,
    finite: bool = True,
    below: int | None = None,
) -> np.ndarray:
    """An array by its name.

    Args:
        arrays: where it is.
        name: its name.
        dtype: its type.
        shape: its sizes; None for any.
        finite: whether inf is refused as NaN is.
        below: its values are from 0 to below this; None for any.

    Raises:
        MsQuantError: it is missing or another one.
    """
    found = arrays.get(name)
    if found is None:
        raise BadFileError(f"{name}: missing, expected {np.dtype(dtype)} values")
    sizes = zip(found.shape, shape, strict=False)
    same = found.ndim == len(shape) and all(want in (None, size) for size, want in sizes)
    if found.dtype != dtype or not same:
        wanted = ["any" if size is None else size for size in shape]
        raise BadFileError(
            f"{name}: is {found.dtype} {list(found.shape)}, expected {np.dtype(dtype)} {wanted}"
        )
    if np.isnan(found).any() or (finite and not np.isfinite(found).all()):
        raise BadFileError(f"{name}: holds NaN or inf, expected numbers")
    if below is not None and found.size and not 0 <= found.min() <= found.max() < below:
        raise BadFileError(
            f"{name}: holds {found.min()} to {found.max()}, expected 0 to below {below}"
        )
    return found
