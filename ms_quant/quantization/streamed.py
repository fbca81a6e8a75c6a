"""Weights that are rounded to nearest from themselves alone, some rows at a time.

A row of an affine weight has parameters of its own, so nothing asks for the rest of it. In float32
there are never more than a few rows for each core: temporaries stay in the cache, and a large
weight takes no more memory than its codes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ms_quant import kernels
from ms_quant.algorithms.problem import Problem, Solution, input_quantization
from ms_quant.files.reader import FloatTensors
from ms_quant.models.block_spec import LinearGroup
from ms_quant.numerics.grid import AffineFormat, AffineGrid, Grid, WeightFormat
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan
from ms_quant.quantization.weights import StoredWeights

ELEMENTS = 1 << 19
"""Values that a thread reads at a time: 2 MiB of float32."""
CLEARED = {"float32": 0, "bfloat16": 16}
"""Type of scales to how many of a float32's last bits are 0 then."""


def is_streamed(layer: LayerPlan) -> bool:
    """Whether each row of a weight is rounded for itself, and no algorithm changes it before."""
    format, plain = layer.scheme.weight, not layer.algorithms.names
    return plain and isinstance(format, AffineFormat) and not format.per_tensor


def quantize_streamed(
    plan: Plan, weights: StoredWeights, group: LinearGroup
) -> dict[str, QuantizedLinear]:
    """The quantized linears of a group, by their paths in the block, without biases.

    The same as what reading it whole gives, bit for bit.

    Args:
        plan: what to do; its layer of the group is one of :func:`is_streamed`.
        weights: the block's float parameters.
        group: the linears.

    Raises:
        MsQuantError: a weight holds NaN or infinity.
    """
    layer = plan.layer(weights.index, group)
    problem = Problem(
        name=f"{weights.prefix}{group.fused}",
        scheme=layer.scheme,
        weights={},
        biases={},
        stats=None,
        dtype=plan.dtype,
        mse=_no_error,
        scale_type=layer.storage.scale_type,
    )
    activation = input_quantization(problem, Solution())
    linears = {}
    for member in group.members:
        name = f"{member}.weight"
        codes, grid = rounded_by_rows(
            weights.checkpoint,
            weights.prefix + name,
            layer.scheme.weight,
            problem.scale_dtype,
            name,
        )
        linears[member] = QuantizedLinear(codes, grid, activation=activation)
    return linears


def rounded_by_rows(
    checkpoint: FloatTensors,
    full: str,
    format: WeightFormat,
    scale_dtype: np.dtype,
    name: str = "weight",
) -> tuple[np.ndarray, Grid]:
    """The codes and the grid of a weight of whose rows each has parameters of its own.

    Args:
        checkpoint: where it is.
        full: its name there.
        format: what it is rounded to.
        scale_dtype: the type of the scales.
        name: what errors call it.

    Raises:
        MsQuantError: it holds NaN or infinity, or numbers that the format cannot hold.
    """
    count, columns = checkpoint.info(full).shape
    size, step = format.group_size or columns, max(1, ELEMENTS // max(1, columns))
    cleared = None
    if isinstance(format, AffineFormat) and format.symmetric and not format.group_size:
        cleared = CLEARED.get(scale_dtype.name)
    codes = np.empty((count, columns), np.int8 if format.integer else np.uint8)

    def affine_grid(scale: np.ndarray, zeros: np.ndarray) -> AffineGrid:
        assert isinstance(format, AffineFormat)
        return AffineGrid(scale, zeros, format, size, scale_dtype, name)

    def rounded(start: int) -> Grid:
        part = slice(start, min(start + step, count))
        ((_, stored),) = checkpoint.float_chunks(full, part)
        rows = stored.astype(np.float32, copy=False)
        if cleared is None or not kernels.available():
            grid = format.fit(rows, name, scale_dtype)
            codes[part] = grid.round(rows)
            return grid
        codes[part], scale = kernels.quantize_rows(rows, format.bits, threads=1, cleared=cleared)
        return affine_grid(scale, np.zeros(scale.shape, np.int8))

    grids = [rounded(0)]  # alone: the first to read a tensor may have to prove it
    with ThreadPoolExecutor(kernels.threads_of(None)) as pool:
        grids += pool.map(rounded, range(step, count, step))
    if isinstance(format, AffineFormat):
        ours = [grid for grid in grids if isinstance(grid, AffineGrid)]
        scales, zeros = zip(*((grid.scale, grid.zero_point) for grid in ours), strict=True)
        return codes, affine_grid(np.concatenate(scales), np.concatenate(zeros))
    parts = [grid.arrays() for grid in grids]
    return codes, format.grid({key: np.concatenate([p[key] for p in parts]) for key in parts[0]})


def _no_error(candidate: object) -> float:
    raise AssertionError("an error of a weight that is rounded to nearest")
