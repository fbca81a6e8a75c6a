"""A quantized linear from its tensors in the ascend format. What is read is checked.

A tensor that contradicts another, or that holds what no writer makes, is an error: ``verify``
reads every linear this way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ms_quant.errors import MsQuantError
from ms_quant.files.reader import Checkpoint
from ms_quant.formats.ascend.codes import codes_of, has_scale_bias
from ms_quant.formats.ascend.leeway import BF16_STEPS, check_scale_bias, stated
from ms_quant.formats.ascend.tensors import narrowed, scale_bias, slices_of
from ms_quant.models.block_spec import LinearGroup, LinearSpec
from ms_quant.numerics.activation import (
    Activation,
    PerToken,
    Phased,
    PhasedActivation,
    StaticActivation,
    StaticInt8,
)
from ms_quant.numerics.affine import QMAX, QMIN
from ms_quant.numerics.float_grid import FloatFormat, MxFormat
from ms_quant.numerics.grid import AffineFormat, Grid, TwoLevelFormat
from ms_quant.numerics.linear import Kronecker, LowRank, QuantizedLinear, folded_bias
from ms_quant.numerics.reciprocal import rounded_reciprocal
from ms_quant.plan.layer import LayerPlan


class _Source:
    """The tensors of one linear, by suffix."""

    def __init__(self, checkpoint: Checkpoint, path: str):
        self.checkpoint, self.path = checkpoint, path
        start = f"{path}."
        self.suffixes = {n[len(start) :] for n in checkpoint.names if n.startswith(start)}

    def __call__(self, suffix: str) -> np.ndarray:
        return self.checkpoint.read(f"{self.path}.{suffix}")

    def float32(self, suffix: str) -> np.ndarray:
        return self.checkpoint.read_float32(f"{self.path}.{suffix}")

    def scale(self, suffix: str) -> np.ndarray:
        """Positive finite float32."""
        array = self.float32(suffix)
        wrong = int(np.count_nonzero(array <= 0))
        if wrong:
            raise MsQuantError(
                f"{self.path}.{suffix}: {wrong} scales are not positive, expected all to be"
            )
        return array

    def require(self, good: np.ndarray, suffix: str, what: str) -> None:
        wrong = int(good.size - np.count_nonzero(good))
        if wrong:
            raise MsQuantError(f"{self.path}.{suffix}: {wrong} of {good.size} {what}")

    def same(self, suffix: str, found: np.ndarray, made: Callable[[], np.ndarray]) -> None:
        equal = np.equal(found, made())
        self.require(equal, suffix, "values differ from what the other tensors give")


def read_linear(
    layer: LayerPlan,
    group: LinearGroup,
    spec: LinearSpec,
    checkpoint: Checkpoint,
    path: str,
    bias: np.ndarray | None,
) -> QuantizedLinear:
    """The linear at a path, with its bias.

    Raises:
        MsQuantError: names the tensor that is wrong.
    """
    source, scheme = _Source(checkpoint, path), layer.scheme
    codes = codes_of(scheme, layer.dtype)
    weight = codes.unpack(source("weight"), spec.in_features, f"{path}.weight")
    linear = QuantizedLinear(
        weight,
        _grid(layer, source, path),
        bias,
        _activation(layer, spec, source, path),
        None,
        _kronecker(source),
        _branch(source),
    )
    if isinstance(scheme.activation, StaticInt8 | Phased):
        linear = _checked_product(layer, source, linear)
    if has_scale_bias(scheme):
        _check_scale_bias(layer, group, source, linear)
    return linear


def _checked_product(layer: LayerPlan, source: _Source, linear: QuantizedLinear) -> QuantizedLinear:
    """The linear, whose ``deq_scale`` and ``quant_bias`` follow from the rest, or nearly so."""
    scale, bias = _deq_scale(source), source("quant_bias")
    if layer.foreign:
        if isinstance(layer.scheme.activation, StaticInt8) and "weight_scale" in source.suffixes:
            _check_old_scales(source, linear)
        return stated(linear, scale, bias, source.path)
    source.same("deq_scale", scale, lambda: linear.deq_scale)
    source.same("quant_bias", bias, lambda: folded_bias(linear, source.path))
    return linear


def _check_old_scales(source: _Source, linear: QuantizedLinear) -> None:
    """The scales that old msModelSlim stores beside their product, which alone is computed with."""
    scale = source.scale("weight_scale").reshape(-1)
    source.require(
        np.abs(scale * linear.static.input_scale[0] / linear.deq_scale - 1) <= BF16_STEPS,
        "weight_scale",
        "scales times input_scale are not deq_scale, even rounded to bfloat16",
    )
    if "weight_offset" in source.suffixes:
        _zero_points(source, "weight_offset", symmetric=True)


def _check_scale_bias(
    layer: LayerPlan, group: LinearGroup, source: _Source, linear: QuantizedLinear
) -> None:
    found, slices = source.float32("scale_bias"), slices_of(group)
    if not layer.foreign:
        source.same("scale_bias", found, lambda: scale_bias(linear.weight, linear.grid, slices))
        return
    made = scale_bias(linear.weight, linear.grid, slices)
    largest = scale_bias(np.abs(linear.weight), linear.grid, slices)
    check_scale_bias(found, made, largest, source.path)


def _grid(layer: LayerPlan, source: _Source, path: str) -> Grid:
    format = layer.scheme.weight
    if isinstance(format, FloatFormat):
        return format.grid({})
    if isinstance(format, MxFormat):
        exponents = source("weight_scale")
        source.require(exponents != 255, "weight_scale", "exponents are 255 (NaN)")
        return format.grid({"weight_exponent": exponents})
    if isinstance(layer.scheme.activation, StaticInt8):
        return format.grid({"weight_scale": _deq_scale(source)[:, None]})
    arrays = {"weight_scale": source.scale("weight_scale")}
    if isinstance(format, TwoLevelFormat):
        arrays["weight_scale_second"] = source.scale("weight_scale_second")
        _zero_points(source, "weight_offset_second", symmetric=True)
    symmetric = not isinstance(format, AffineFormat) or format.symmetric
    arrays["weight_zero_point"] = _zero_points(source, "weight_offset", symmetric)
    return format.grid(arrays)


def _zero_points(source: _Source, suffix: str, symmetric: bool) -> np.ndarray:
    """int8 zero points of the offsets that the runtime adds."""
    offset = source.float32(suffix)
    if symmetric:
        source.require(offset == 0, suffix, "offsets are not 0, the weights are symmetric")
    whole = (offset == np.rint(offset)) & (-offset >= QMIN) & (-offset <= QMAX)
    source.require(whole, suffix, f"offsets are not whole numbers of {-QMAX} to {-QMIN}")
    return (-offset).astype(np.int8)


def _deq_scale(source: _Source) -> np.ndarray:
    """float32 (out,), positive."""
    stored = source("deq_scale")
    if stored.dtype.kind not in "iu":
        stored = stored.astype(np.float32)
    if stored.dtype == np.int64:
        source.require(stored == stored.astype(np.int32), "deq_scale", "values exceed 32 bits")
        stored = narrowed(stored)
    good = np.isfinite(stored) & (stored > 0)
    source.require(good, "deq_scale", "scales are not positive and finite")
    return stored


def _activation(layer: LayerPlan, spec: LinearSpec, source: _Source, path: str) -> Activation:
    format = layer.scheme.activation
    if isinstance(format, PerToken) and "clip_ratio" in source.suffixes:
        clip = source.float32("clip_ratio")
        source.require((clip > 0) & (clip <= 1), "clip_ratio", "ratios are not in (0, 1]")
        return PerToken(format.bits, float(clip[0]))
    if format.dynamic:
        return format.fit(None, None)
    step, offset = source.scale("input_scale"), source.float32("input_offset")
    whole = (offset == np.rint(offset)) & (offset >= QMIN) & (offset <= QMAX)
    source.require(whole, "input_offset", f"zero points are not whole numbers of {QMIN} to {QMAX}")
    vector = np.full(spec.in_features, step[0], np.float32)
    # Without a weight_scale only the product of both scales is known: deq_scale stands for it.
    scale = step[0] if isinstance(format, Phased) else np.float32(1)
    multiplies = isinstance(format, StaticInt8 | Phased) and format.multiplies
    multiplied_in = layer.dtype if multiplies else None
    static = StaticActivation(scale, int(offset[0]), vector, True, multiplied_in)
    if multiplied_in is not None:
        held = rounded_reciprocal(step, multiplied_in)
        good = np.isfinite(held) & (held > 0)
        source.require(good, "input_scale", f"values have no reciprocal in {multiplied_in.name}")
    return PhasedActivation(static) if isinstance(format, Phased) else static


def _kronecker(source: _Source) -> Kronecker | None:
    if "left_trans" not in source.suffixes:
        return None
    return Kronecker(source.float32("left_trans"), source.float32("right_trans"))


def _branch(source: _Source) -> LowRank | None:
    if "svd_lowrank_l1" not in source.suffixes:
        return None
    return LowRank(source.float32("svd_lowrank_l1"), source.float32("svd_lowrank_l2"))
