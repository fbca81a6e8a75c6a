"""Products of float matrices, and statistics of their columns."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ms_quant.kernels.native import (
    NO_ISA,
    NOT_FINITE,
    available,
    number_of,
    status_of,
    threads_of,
)

MANY_ROWS = 128  # from which AMX is faster: it splits the weight first


@lru_cache(maxsize=1)
def has_product() -> bool:
    """Whether this machine, and the library as it was built, has :func:`product`."""
    one = np.ones((1, 1), np.float32)
    return available() and product(one, one) is not None


def product(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, threads: int | None = None
) -> np.ndarray | None:
    """x @ weight.T + bias on AMX, as exact as in float32; None where BLAS must do it.

    That is on machines without AMX, and where a number is NaN, infinite or above 3.3e38.

    Args:
        x: float32 (rows, in), some of each.
        weight: float32 (out, in).
        bias: float32 (out,) or None.
        threads: at most so many; None for all.

    Returns:
        float32 (rows, out). It differs from the exact result by at most (in + 8) * 2^-24 times
        the sum of all magnitudes, and where numbers are below 1e-30 by 1e-38 a product.
    """
    x, weight = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(weight, np.float32)
    y = np.empty((len(x), len(weight)), np.float32)
    added = None if bias is None else np.ascontiguousarray(bias, np.float32)
    status = status_of(
        "msq_product",
        *(x.ctypes.data, len(x), weight.ctypes.data, *weight.shape),
        *(None if added is None else added.ctypes.data, y.ctypes.data, threads_of(threads)),
        passed=(NO_ISA, NOT_FINITE),
    )
    return None if status else y


def matmul(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, threads: int | None = None
) -> np.ndarray:
    """x @ weight.T + bias: of many rows by :func:`product`, if there is one, else by BLAS.

    NaN and infinities go on as they do in any product.
    """
    if len(x) >= MANY_ROWS and has_product():
        y = product(x, weight, bias, threads)
        if y is not None:
            return y
    with np.errstate(all="ignore"):
        y = np.matmul(x, weight.T)
        return y if bias is None else np.add(y, bias, out=y)


def syrk(products: np.ndarray, x: np.ndarray, threads: int | None = None) -> bool:
    """Adds x^T x to the lower triangle of a matrix on AMX; only that triangle is defined then.

    Args:
        products: float32 (columns, columns), changed in place.
        x: float32 (rows, columns), some of each.
        threads: at most so many; None for all.

    Returns:
        False where BLAS must do it, as for :func:`product`; where a number is
        too large, ``products`` is undefined then.
    """
    x = np.ascontiguousarray(x, np.float32)
    arguments = x.ctypes.data, *x.shape, products.ctypes.data, threads_of(threads)
    return not status_of("msq_syrk", *arguments, passed=(NO_ISA, NOT_FINITE))


def column_stats(
    x: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    squares: np.ndarray,
    sizes: np.ndarray,
    threads: int | None = None,
    isa: str | None = None,
) -> bool:
    """Adds rows to the statistics of their columns, in place.

    Args:
        x: float32 (rows, columns).
        low, high: float32 (columns,), smallest and largest.
        squares, sizes: float64 (columns,), sums of squares and of magnitudes.
        threads: at most so many; None for all.
        isa: a name from ``ISAS``, None for the fastest there is.

    Returns:
        Whether all is finite; else the statistics are undefined.
    """
    x = np.ascontiguousarray(x, np.float32)
    pointers = [array.ctypes.data for array in (low, high, squares, sizes)]
    status = status_of(
        "msq_column_stats",
        *(number_of(isa), x.ctypes.data, *x.shape, *pointers, threads_of(threads)),
        passed=(NOT_FINITE,),
    )
    return not status
