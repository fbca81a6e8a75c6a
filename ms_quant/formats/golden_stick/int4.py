"""Experts of int4 per group, as MindFormers reads them: pairs of outputs and scales in uint64."""

from __future__ import annotations

import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.files.reader import Checkpoint
from ms_quant.formats.format import Tensors
from ms_quant.numerics import pack
from ms_quant.numerics.grid import AffineFormat, AffineGrid
from ms_quant.numerics.linear import QuantizedLinear

INT8, UINT64 = np.dtype(np.int8), np.dtype(np.uint64)
SCHEME, KEY = "W4A8_DYNAMIC", "group_size"
"""The scheme, and the entry of the description that has the size of its groups."""


def linear_plan(shape: tuple[int, int], group_size: int) -> Tensors:
    """Suffix to type and shape."""
    rows, columns = shape
    return {
        "weight": (INT8, (rows // 2, columns)),
        "weight_scale": (UINT64, (rows, columns // group_size)),
    }


def linear_tensor(linear: QuantizedLinear, suffix: str) -> np.ndarray:
    """One tensor, as stored."""
    if suffix == "weight":
        return pack.pack_along_out(linear.weight, "weight")
    assert isinstance(linear.grid, AffineGrid)
    return linear.grid.scale.view(np.uint32).astype(UINT64)


def read_linear(
    format: AffineFormat, checkpoint: Checkpoint, path: str, bias: np.ndarray | None
) -> QuantizedLinear:
    """The linear at a path.

    Raises:
        MsQuantError: a scale is not the bits of a positive float32.
    """
    stored = checkpoint.read(f"{path}.weight_scale")
    scale = stored.astype(np.uint32).view(np.float32)
    good = (stored >> np.uint64(32) == 0) & np.isfinite(scale) & (scale > 0)
    wrong = int(good.size - np.count_nonzero(good))
    if wrong:
        raise BadFileError(
            f"{path}.weight_scale: {wrong} of {good.size} values are not the bits of a positive "
            "float32, expected those in the low half and zeros above"
        )
    weight = pack.unpack_along_out(checkpoint.read(f"{path}.weight"), f"{path}.weight")
    return QuantizedLinear(weight, format.grid({"weight_scale": scale}), bias)
