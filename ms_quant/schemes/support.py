"""Which checkpoint format holds which scheme, and who serves it: a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ms_quant.errors import UnsupportedError
from ms_quant.numerics.activation import MxTokens, StaticInt8
from ms_quant.numerics.grid import AffineFormat, WeightFormat
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.storage import FormatSupport, ScaleType, SmoothingTarget, Storage
from ms_quant.schemes.table import IN_BIAS, VALUES, get_scheme

FLOAT_BIAS = StaticInt8(per_channel=False)
MULTIPLIED = StaticInt8(False, folds_bias=True, multiplies=True)
_HALF_EVEN = MxTokens("mxfp4_cann0")  # MindIE-SD asks the operator for rint, vllm-ascend for round
_NATIVE = "vllm-mindspore Native (--quantization golden-stick)"
_MINDFORMERS = "vllm-mindspore MindFormers backend"
_VLLM_ASCEND = "vllm-ascend (--quantization ascend)"
_OLD_VLLM_ASCEND = "vllm-ascend up to 0.25 (--quantization ascend)"
_MINDIE_SD = "MindIE-SD quantize()"
_VLLM = "vLLM (the checkpoint says how)"
_COMPRESSED = "sparse-compress compress makes it the W8A8SC of the Atlas 300I Duo"
_NONE = "no runtime is known to serve it from these tensors yet; ms-quant eval and generate run it"
_STATIC_OPS = "npu_quantize, npu_quant_matmul"
_INT8_OPS = "npu_dynamic_quant, npu_quant_matmul"
_WEIGHT_OP = "npu_weight_quant_batchmatmul"
GROUPS = tuple(size for size in VALUES["group_size"] if size)
_PER_CHANNEL = {"group_size": 0, "symmetric": True}
_MX_OPS = "npu_dynamic_mx_quant, npu_quant_matmul"


def _one_level(weight: WeightFormat) -> WeightFormat:
    """int4 per group without a level of int8 between."""
    return AffineFormat(4, group_size=weight.group_size)


def _golden_stick(*served_by: str, kernels: str, **more: Any) -> FormatSupport:
    return FormatSupport("golden-stick", served_by, kernels, **more)


def _ascend(*served_by: str, kernels: str = "", **more: Any) -> FormatSupport:
    missing = () if served_by else (_NONE,)
    return FormatSupport("ascend", served_by, kernels, missing, **more)


def _mindie_sd(kernels: str, smooths: bool = True, **more: Any) -> FormatSupport:
    able = (SmoothingTarget.MUL_SCALE, SmoothingTarget.NORM) if smooths else (SmoothingTarget.NORM,)
    targets = dict.fromkeys(able, more.pop("activation", None))
    scales = more.pop("scale_type", ScaleType.MODEL)
    return FormatSupport(
        "mindie-sd", (_MINDIE_SD,), kernels, scale_type=scales, targets=targets, **more
    )


def _compressed_tensors(*served_by: str, kernels: str, **more: Any) -> FormatSupport:
    scales = ScaleType.MODEL
    return FormatSupport(
        "compressed-tensors", (_VLLM, *served_by), kernels, scale_type=scales, **more
    )


def _wide_compressed_tensors(*served_by: str, kernels: str, **more: Any) -> FormatSupport:
    """Of schemes whose inputs are quantized, too: vLLM holds their scales in float32."""
    return _compressed_tensors(*served_by, kernels=kernels, float32_scales=True, **more)


SUPPORT: dict[str, tuple[FormatSupport, ...]] = {
    "W8A8": (
        _golden_stick(
            _NATIVE,
            _MINDFORMERS,
            kernels="QuantV2, QuantBatchMatmul",
            targets={SmoothingTarget.INPUT_SCALE: None, SmoothingTarget.NORM: FLOAT_BIAS},
        ),
        _ascend(_VLLM_ASCEND, kernels=_STATIC_OPS, targets={SmoothingTarget.NORM: MULTIPLIED}),
        _wide_compressed_tensors(
            kernels="cutlass_scaled_mm", targets={SmoothingTarget.NORM: FLOAT_BIAS}
        ),
        _mindie_sd(_STATIC_OPS, scale_type=ScaleType.FLOAT32, activation=IN_BIAS),
    ),
    "W8A8_DYNAMIC": (
        _golden_stick(
            _MINDFORMERS,
            kernels="DynamicQuantExt, QuantBatchMatmul",
            not_served_by=(f"{_NATIVE} does not serve W8A8_DYNAMIC",),
            scale_type=ScaleType.BFLOAT16,
        ),
        _ascend(_VLLM_ASCEND, kernels=_INT8_OPS, scale_type=ScaleType.MODEL),
        _wide_compressed_tensors("vllm-ascend", kernels="cutlass_scaled_mm"),
        _mindie_sd(_INT8_OPS),
    ),
    "W8A8_PER_TENSOR": (_mindie_sd(_STATIC_OPS, scale_type=ScaleType.FLOAT32),),
    "W8A8_PER_CHANNEL": (_mindie_sd(_STATIC_OPS, scale_type=ScaleType.FLOAT32),),
    "W8A8_MIX": (
        _ascend(
            _VLLM_ASCEND,
            kernels=f"npu_quantize in decode, {_INT8_OPS}",
            scale_type=ScaleType.MODEL,
        ),
    ),
    "W8A8S": (
        FormatSupport("ascend", (), "", (_COMPRESSED,), targets={SmoothingTarget.NORM: IN_BIAS}),
    ),
    "W8A16": (
        _ascend(
            _VLLM_ASCEND,
            kernels=_WEIGHT_OP,
            scale_type=ScaleType.MODEL,
            only={"group_size": 0},
        ),
        _compressed_tensors(kernels="marlin, machete"),
        _mindie_sd(_WEIGHT_OP, smooths=False, only=_PER_CHANNEL),
    ),
    "W4A16": (
        _compressed_tensors(kernels="marlin, machete", routed_by=(_VLLM, "vllm-ascend")),
        _mindie_sd(_WEIGHT_OP, smooths=False, only=_PER_CHANNEL),
    ),
    "W4A8_DYNAMIC": (
        _ascend(
            _OLD_VLLM_ASCEND,
            kernels=_WEIGHT_OP,
            scale_type=ScaleType.MODEL,
            routed_by=(_VLLM_ASCEND,),
        ),
        _golden_stick(
            _MINDFORMERS,
            kernels="DynamicQuantExt, GroupedMatmulV4",
            not_served_by=(f"{_NATIVE} does not serve W4A8_DYNAMIC",),
            only={"group_size": GROUPS},
            weight=_one_level,
        ),
    ),
    "W4A4_DYNAMIC": (
        _ascend(_VLLM_ASCEND, kernels=_INT8_OPS),
        _mindie_sd(_INT8_OPS, smooths=False),
    ),
    "W4A4_FLATQUANT_DYNAMIC": (
        _ascend(_VLLM_ASCEND, kernels="npu_kronecker_quant, npu_quant_matmul"),
    ),
    "W8A8FP8_DYNAMIC": (
        _ascend(_VLLM_ASCEND, kernels=_INT8_OPS),
        _wide_compressed_tensors(kernels="cutlass_scaled_mm"),
    ),
    "W8A8FP8_BLOCK": (_wide_compressed_tensors(kernels="deep_gemm, w8a8_block_fp8_matmul"),),
    "W8A8_MXFP8": (
        _ascend(_VLLM_ASCEND, kernels=_MX_OPS),
        _mindie_sd(_MX_OPS, scale_type=ScaleType.FLOAT32),
    ),
    "W4A8_MXFP": (_ascend(_VLLM_ASCEND, kernels=_MX_OPS),),
    "W4A4_MXFP4": (
        _ascend(_VLLM_ASCEND, kernels=_MX_OPS),
        _mindie_sd(_MX_OPS, scale_type=ScaleType.FLOAT32, activation=_HALF_EVEN),
    ),
    "W4A4_MXFP4_DUALSCALE": (
        _mindie_sd(_MX_OPS, scale_type=ScaleType.FLOAT32, only={"dual_block_size": 512}),
    ),
    "W4A4_MXFP4_SVD": (_ascend(),),
    "W16A16S": (_ascend(scale_type=ScaleType.MODEL),),
}
"""Name of a scheme to the formats that hold it, the default first; a scheme that no checkpoint of
a decoder holds has no row."""


def support_of(name: str) -> tuple[FormatSupport, ...]:
    """The formats that hold a scheme with some options, the default first."""
    return SUPPORT.get(name, ())


def store(
    scheme: Scheme,
    dtype: np.dtype,
    format: str = "",
    target: SmoothingTarget | None = None,
) -> tuple[Scheme, Storage]:
    """A scheme as one format holds it: its inputs may be quantized in another way there.

    Args:
        scheme: the scheme with its options.
        dtype: the type of what stays float.
        format: a checkpoint format; "" is the first that a runtime serves, else the first.
        target: where a smoothing vector goes; None is the format's first choice.

    Raises:
        MsQuantError: the format cannot hold the scheme or the smoothing there, or none holds it.
    """
    fitting = list(_fitting(scheme).values())
    if format:
        fitting = [row for row in fitting if row.format == format]
    if not fitting:
        raise UnsupportedError(f"scheme {scheme.name}: {why_not_held(scheme.name, format)}")
    row = next((row for row in fitting if row.served_by), fitting[0])
    if target is not None and target not in row.targets:
        able = " or ".join(known.value for known in row.targets)
        raise UnsupportedError(
            f"smoothing target {target.value}: {row.format} checkpoints of scheme {scheme.name} "
            f"cannot hold a smoothing vector there, expected {able}"
        )
    target = target or next(iter(row.targets))
    weight = scheme.weight if row.weight is None else row.weight(scheme.weight)
    scheme = replace(scheme, weight=weight, activation=row.targets[target] or scheme.activation)
    return scheme, Storage(row, target, dtype, row.scale_type)


def held_by(format: str) -> list[str]:
    """The schemes that a format holds."""
    return [name for name, rows in SUPPORT.items() if format in {row.format for row in rows}]


def why_not_held(name: str, format: str = "") -> str:
    """Why checkpoints of a format, or of any, do not hold a scheme with its options."""
    rows = [row for row in support_of(name) if row.format == format or not format]
    for row in rows:
        return f"{row.format} checkpoints hold it only with {row.wanted}"
    if not support_of(name):
        return (
            "is for networks and not for checkpoints of decoders, use "
            f'ms_quant.quantize(network, "{name}", ...)'
        )
    able = ", ".join(row.format for row in support_of(name))
    return f"no {format} checkpoint can hold it, expected one of {able}"


def served_formats(name: str, /, **chosen: Any) -> list[str]:
    """The formats in which some runtime serves a scheme with these options."""
    rows = _fitting(get_scheme(name, **chosen))
    return [format for format, row in rows.items() if row.served_by]


def holding_formats(name: str, /, **chosen: Any) -> list[str]:
    """The formats that hold a scheme with these options."""
    return list(_fitting(get_scheme(name, **chosen)))


def _fitting(scheme: Scheme) -> Mapping[str, FormatSupport]:
    chosen = scheme.chosen
    return {row.format: row for row in support_of(scheme.name) if row.takes(chosen)}
