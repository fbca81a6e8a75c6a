"""Weights that are rounded to nearest from themselves alone, some rows at a time.

A row of an affine weight has parameters of its own, so nothing asks for the rest of it. In float32
there are never more than a few rows for each core: temporaries stay in the cache, and a large
weight takes no more memory than its codes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np

from ms_quant import kernels
from ms_quant.algorithms.problem import Problem, Solution, input_quantization
from ms_quant.files.reader import Checkpoint, FloatTensors
from ms_quant.models.block_spec import LinearGroup
from ms_quant.numerics.grid import AffineFormat, AffineGrid, Grid, WeightFormat
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan
from ms_quant.quantization.weights import StoredWeights

ELEMENTS = 1 << 19
"""Values that a thread reads at a time: 2 MiB of float32. Natively they are not made float32, and
where there are enough for all threads, it reads four times as many."""
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
    with nullcontext(weights.threads) if weights.threads else _new_threads() as threads:
        for member in group.members:
            name = f"{member}.weight"
            full, format = f"{weights.prefix}{name}", layer.scheme.weight
            codes, grid = rounded_by_rows(
                weights.checkpoint, full, format, problem.scale_dtype, name, threads
            )
            assert isinstance(grid, AffineGrid)
            linears[member] = QuantizedLinear(codes, grid, activation=activation)
    return linears


def _new_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(kernels.threads_of(None))


def rounded_by_rows(
    checkpoint: FloatTensors,
    full: str,
    format: WeightFormat,
    scale_dtype: np.dtype,
    name: str,
    threads: ThreadPoolExecutor | None = None,
) -> tuple[np.ndarray, Grid]:
    """The codes and the grid of a weight of whose rows each has parameters of its own.

    Args:
        checkpoint: where it is.
        full: its name there.
        format: what it is rounded to.
        scale_dtype: the type of the scales.
        name: what errors call it.
        threads: that round rows; None is new ones.

    Raises:
        MsQuantError: it holds NaN or infinity, or numbers that the format cannot hold.
    """
    assert isinstance(checkpoint, Checkpoint)
    with nullcontext(threads) if threads else _new_threads() as pool:
        if isinstance(format, AffineFormat):
            return _rounded_integers(checkpoint, full, format, scale_dtype, name, pool)
        return _rounded_floats(checkpoint, full, format, scale_dtype, name, pool)


def _rounded_floats(
    checkpoint: Checkpoint,
    full: str,
    format: WeightFormat,
    scale_dtype: np.dtype,
    name: str,
    threads: ThreadPoolExecutor,
) -> tuple[np.ndarray, Grid]:
    count, columns = checkpoint.info(full).shape
    codes, step = np.empty((count, columns), np.uint8), max(1, ELEMENTS // columns)

    def rounded(start: int) -> dict[str, np.ndarray]:
        part = slice(start, min(start + step, count))
        rows = _float32(checkpoint, full, part)
        grid = format.fit(rows, name, scale_dtype)
        codes[part] = grid.round(rows)
        return grid.arrays()

    parts = [rounded(0)] if checkpoint.digests else []
    parts += threads.map(rounded, range(step * len(parts), count, step))
    return codes, format.grid({key: np.concatenate([p[key] for p in parts]) for key in parts[0]})


def _rounded_integers(
    checkpoint: Checkpoint,
    full: str,
    format: AffineFormat,
    scale_dtype: np.dtype,
    name: str,
    threads: ThreadPoolExecutor,
) -> tuple[np.ndarray, AffineGrid]:
    count, columns = checkpoint.info(full).shape
    size = format.group_size or columns
    cleared = CLEARED.get(scale_dtype.name) if format.symmetric and not format.group_size else None
    native = cleared is not None and kernels.available()
    step = max(1, ELEMENTS // columns)
    if native:  # as many for each thread, of at most four times the size
        turns = max(1, -(-count // (4 * step * kernels.threads_of(None))))
        step = max(step, -(-count // (turns * kernels.threads_of(None))))
    codes = np.empty((count, columns), np.int8)

    def grid_of(scale: np.ndarray, zeros: np.ndarray) -> AffineGrid:
        return AffineGrid(scale, zeros, format, size, scale_dtype, name)

    def rounded(start: int) -> AffineGrid:
        part = slice(start, min(start + step, count))
        if cleared is None or not native:
            rows = _float32(checkpoint, full, part)
            grid = format.fit(rows, name, scale_dtype)
            codes[part] = grid.round(rows)
            return grid
        scale = _rounded_natively(checkpoint, full, part, codes[part], format.bits, cleared)
        return grid_of(scale, np.zeros(scale.shape, np.int8))

    # The first to read a tensor may have to prove it, and does so alone.
    grids = [rounded(0)] if checkpoint.digests else []
    grids += threads.map(rounded, range(step * len(grids), count, step))
    scales = np.concatenate([grid.scale for grid in grids])
    return codes, grid_of(scales, np.concatenate([grid.zero_point for grid in grids]))


def _rounded_natively(
    checkpoint: Checkpoint, name: str, part: slice, codes: np.ndarray, bits: int, cleared: int
) -> np.ndarray:
    """Writes the codes of some rows; their scales."""
    stored = checkpoint.stored_rows(name, part.start, part.stop)
    if stored is not None:
        rows = stored.values, stored.scales, stored.width
        scale = kernels.quantize_stored(*rows, codes, bits, cleared, threads=1)
        if scale is not None:
            return scale
    wide = _float32(checkpoint, name, part)  # which refuses NaN by the tensor's name
    codes[:], scale = kernels.quantize_rows(wide, bits, threads=1, cleared=cleared)
    return scale


def _float32(checkpoint: Checkpoint, name: str, part: slice) -> np.ndarray:
    ((_, stored),) = checkpoint.float_chunks(name, part)
    return stored.astype(np.float32, copy=False)


def _no_error(candidate: object) -> float:
    raise AssertionError("an error of a weight that is rounded to nearest")
