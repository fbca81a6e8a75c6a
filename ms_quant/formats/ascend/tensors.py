"""The tensors of a quantized linear in the ascend format: type, shape and value of each.

docs/ascend_format.md states them. They follow from the formats of the weight and the input and
from what the algorithms add, not from a scheme's name.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ms_quant.formats.ascend.codes import codes_of, has_scale_bias
from ms_quant.formats.format import Part
from ms_quant.models.block_spec import LinearGroup
from ms_quant.numerics import rotation, w4a8
from ms_quant.numerics.activation import PerToken, Phased, StaticInt8
from ms_quant.numerics.float_grid import DualMxGrid, FloatFormat, MxFormat, MxGrid
from ms_quant.numerics.grid import AffineGrid, Grid, TwoLevelFormat, TwoLevelGrid
from ms_quant.numerics.groupwise import antiquant_offset
from ms_quant.numerics.linear import QuantizedLinear, folded_bias
from ms_quant.plan.layer import LayerPlan

INT32, INT64 = np.dtype(np.int32), np.dtype(np.int64)
FLOAT32, UINT8 = np.dtype(np.float32), np.dtype(np.uint8)
CHUNK = 1 << 20  # codes whose float64 products are held at a time
WITH_CODES = frozenset({"weight", "quant_bias", "scale_bias"})


def parts(layer: LayerPlan, group: LinearGroup, shape: tuple[int, int]) -> dict[str, Part]:
    """Suffix to tensor of a linear of a group and shape (out, in), without its bias."""
    scheme, codes = layer.scheme, codes_of(layer.scheme, layer.dtype)
    result = {
        "weight": Part(codes.dtype, codes.shape(*shape), lambda x: codes.pack(x.weight, "weight"))
    }
    if isinstance(scheme.activation, StaticInt8 | Phased):
        result |= _static(layer, shape)
    if not isinstance(scheme.activation, StaticInt8):
        result |= _scales(layer, shape)
    if has_scale_bias(scheme):
        slices = slices_of(group)
        result["scale_bias"] = Part(
            FLOAT32, (shape[0], slices), lambda x: scale_bias(x.weight, x.grid, slices)
        )
    return result | _added(layer, shape)


def _static(layer: LayerPlan, shape: tuple[int, int]) -> dict[str, Part]:
    """The parameters of a static input, one step for all channels, and what follows from it."""
    wide = layer.dtype.name == "float16"
    return {
        "input_scale": Part(FLOAT32, (1,), lambda x: x.static.input_scale[:1]),
        "input_offset": Part(FLOAT32, (1,), lambda x: np.array([x.static.offset], FLOAT32)),
        "deq_scale": Part(
            INT64 if wide else FLOAT32,
            shape[:1],
            lambda x: widened(x.deq_scale) if wide else x.deq_scale,
        ),
        "quant_bias": Part(INT32, shape[:1], lambda x: folded_bias(x, "linear")),
    }


def widened(scale: np.ndarray) -> np.ndarray:
    """float32 (n,) to int64: the bits as int32, which operators of float16 models take."""
    return scale.view(np.int32).astype(np.int64)


def narrowed(scale: np.ndarray) -> np.ndarray:
    """int64 (n,) to the float32 whose bits it holds; inverts :func:`widened`."""
    return scale.astype(np.int32).view(np.float32)


def _scales(layer: LayerPlan, shape: tuple[int, int]) -> dict[str, Part]:
    format, (rows, columns) = layer.scheme.weight, shape
    if isinstance(format, FloatFormat):
        return {}
    if isinstance(format, MxFormat):
        blocks = (rows, -(-columns // format.group_size))
        return {"weight_scale": Part(UINT8, blocks, lambda x: exponents(x.grid))}
    groups = (rows, columns // format.group_size if format.group_size else 1)
    if isinstance(format, TwoLevelFormat):
        return {
            **_scale_and_offset("", (rows, 1), lambda grid: grid.scale),
            **_scale_and_offset("_second", groups, lambda grid: grid.second.scale),
        }
    return _scale_and_offset("", groups, lambda grid: grid.scale)


def _scale_and_offset(
    level: str, shape: tuple[int, int], scale: Callable[..., np.ndarray]
) -> dict[str, Part]:
    return {
        f"weight_scale{level}": Part(FLOAT32, shape, lambda x: scale(x.grid)),
        f"weight_offset{level}": Part(FLOAT32, shape, lambda x: _offset(x.grid, shape)),
    }


def _offset(grid: Grid, shape: tuple[int, int]) -> np.ndarray:
    if isinstance(grid, AffineGrid) and not grid.format.symmetric:
        return antiquant_offset(grid.zero_point)
    return np.zeros(shape, np.float32)


def exponents(grid: Grid) -> np.ndarray:
    """uint8 (N, blocks): of a grid of microscaling, also inside one of two levels."""
    inner = grid.inner if isinstance(grid, DualMxGrid) else grid
    assert isinstance(inner, MxGrid)
    return inner.exponents


def slices_of(group: LinearGroup) -> int:
    """How many sums of a row ``scale_bias`` holds."""
    return w4a8.ROW_PARALLEL_SLICES if group.parallel == "row" else 1


def scale_bias(weight: np.ndarray, grid: Grid, slices: int) -> np.ndarray:
    """float32 (out, slices) of int4 codes (out, in) on a grid of one or two levels."""
    assert isinstance(grid, AffineGrid | TwoLevelGrid)
    scale = grid.scale.astype(np.float64)
    if isinstance(grid, TwoLevelGrid):
        scale = scale * grid.second.scale
    step = max(1, CHUNK // max(1, weight.shape[1]))
    pieces = (slice(start, start + step) for start in range(0, len(weight), step))
    sums = [w4a8.scale_bias(weight[p], scale[p], "weight", slices) for p in pieces]
    return np.concatenate(sums)


def _added(layer: LayerPlan, shape: tuple[int, int]) -> dict[str, Part]:
    """What algorithms add beside the codes."""
    result: dict[str, Part] = {}
    for name, row in zip(layer.algorithms.names, layer.algorithms.rows, strict=True):
        if row.adds == "branch":
            rank = min(layer.algorithms.options[name].rank, *shape)
            result |= {
                "svd_lowrank_l1": _float(layer, (rank, shape[1]), lambda x: x.branch.l1),
                "svd_lowrank_l2": _float(layer, (shape[0], rank), lambda x: x.branch.l2),
            }
        if row.adds == "kronecker":
            left, right = rotation.balanced_factors(shape[1], "weight")
            result |= {
                "left_trans": _float(layer, (left, left), lambda x: x.kronecker.left),
                "right_trans": _float(layer, (right, right), lambda x: x.kronecker.right),
                "clip_ratio": Part(FLOAT32, (1,), _clip_ratio),
            }
    return result


def _float(layer: LayerPlan, shape: tuple[int, int], make: Callable[..., np.ndarray]) -> Part:
    return Part(layer.dtype, shape, lambda linear: make(linear).astype(layer.dtype))


def _clip_ratio(linear: QuantizedLinear) -> np.ndarray:
    clip = linear.activation.clip if isinstance(linear.activation, PerToken) else 1.0
    return np.array([clip], np.float32)
