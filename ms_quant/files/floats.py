"""Float tensors of a checkpoint in another type, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.files.reader import Checkpoint, FloatTensors


def round_chunks(
    checkpoint: FloatTensors, name: str, dtype: np.dtype, rows: slice | None = None
) -> Iterator[np.ndarray]:
    """Reads a float tensor in pieces and rounds them, half to even; equal types keep their bits.

    Args:
        checkpoint (FloatTensors): where it is.
        name (str): the tensor, of at least one dimension.
        dtype (numpy.dtype): the type to round to.
        rows (slice, optional): which rows to read. Default: all.

    Raises:
        MsQuantError: a value does not fit, besides what ``Checkpoint.float_chunks`` refuses.
    """
    for _, chunk in checkpoint.float_chunks(name, rows):
        yield round_finite(chunk, dtype, checkpoint.place(name))


def round_finite(array: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """Rounds finite numbers to a type, half to even.

    Args:
        array (numpy.ndarray): finite floats.
        dtype (numpy.dtype): the type.
        where (str): what the array is, for the error.

    Raises:
        MsQuantError: a value is too large for the type.
    """
    if array.dtype == dtype:
        return array
    # ml_dtypes have no direct cast between themselves and float16.
    wide = array.astype(np.float32, copy=False)
    with np.errstate(over="ignore", under="ignore"):
        rounded = wide.astype(dtype)
    if not np.isfinite(rounded).all():
        raise BadFileError(
            f"{where}: {np.abs(wide).max():g} does not fit {dtype.name}, expected at most "
            f"{float(ml_dtypes.finfo(dtype).max):g} (bfloat16 holds more)"
        )
    return rounded


def check_fits(checkpoint: Checkpoint, names: Iterable[str], dtype: np.dtype) -> None:
    """Tries every tensor that may have larger numbers than ``dtype``, before any work.

    Raises:
        MsQuantError: a value is too large, NaN or infinite; names the tensor.
    """
    largest = float(ml_dtypes.finfo(dtype).max)
    for name in names:
        if checkpoint.largest(name) > largest:
            for _ in round_chunks(checkpoint, name, dtype):
                pass
