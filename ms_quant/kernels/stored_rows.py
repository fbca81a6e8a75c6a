"""Codes of rows of a weight as they are stored, without a float32 copy of them."""

from __future__ import annotations

import numpy as np

from ms_quant.kernels.native import NOT_FINITE, number_of, status_of, threads_of
from ms_quant.numerics.affine import LIMITS


def quantize_stored(
    stored: np.ndarray,
    block_scales: np.ndarray | None,
    width: int,
    codes: np.ndarray,
    bits: int = 8,
    cleared: int = 0,
    isa: str | None = None,
    threads: int | None = None,
) -> np.ndarray | None:
    """What :func:`~ms_quant.kernels.native.quantize_rows` gives of the same in float32.

    Args:
        stored: (rows, columns), bfloat16, or E4M3 as uint8.
        block_scales: of E4M3, float32 (rows, ceil(columns / width)); else None.
        width: of the runs of columns that share a scale.
        codes: int8 (rows, columns), which are written.
        bits: 8 or 4.
        cleared: how many of a scale's last bits are 0, to which it is rounded up.
        isa: a name from ``ISAS``; None for the fastest there is.
        threads: at most so many; None for all.

    Returns:
        float32 (rows, 1) scales, or None where a value is NaN or infinite, and the codes undefined.
    """
    rows, columns = stored.shape
    assert codes.shape == stored.shape and codes.dtype == np.int8, "codes"
    assert stored.flags.c_contiguous and codes.flags.c_contiguous, "rows"
    if block_scales is None:
        assert stored.dtype.name == "bfloat16", stored.dtype
    else:
        assert stored.dtype == np.uint8, stored.dtype
        assert block_scales.shape == (rows, -(-columns // width)), "block_scales"
        block_scales = np.ascontiguousarray(block_scales, np.float32)
    scales = np.empty((rows, 1), np.float32)
    status = status_of(
        "msq_quantize_stored",
        *(number_of(isa), stored.ctypes.data),
        None if block_scales is None else block_scales.ctypes.data,
        *(width, rows, columns, *LIMITS[bits], cleared),
        *(codes.ctypes.data, scales.ctypes.data, threads_of(threads)),
        passed=(NOT_FINITE,),
    )
    return None if status else scales
