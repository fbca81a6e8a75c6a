"""The schemes, as data. A new one is a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ms_quant.errors import MsQuantError
from ms_quant.numerics.activation import (
    DualMxTokens,
    Float,
    GroupFloat8,
    MxTokens,
    PerToken,
    PerTokenFloat8,
    Phased,
    StaticInt8,
)
from ms_quant.numerics.float8_blocks import Float8BlockFormat
from ms_quant.numerics.float_grid import DualMxFormat, Float8Format, FloatFormat, MxFormat
from ms_quant.numerics.grid import AffineFormat, TwoLevelFormat
from ms_quant.numerics.mx_rules import RULES
from ms_quant.numerics.timestep import Timestep
from ms_quant.schemes.records import Fold, Held, ScaleType, Scheme

VALUES: dict[str, tuple] = {
    "group_size": (0, 32, 64, 128, 256),
    "symmetric": (True, False),
    "rule": tuple(RULES),
    "dual_block_size": tuple(32 * 2**i for i in range(6)),
}
FLOAT_CACHE, STATIC_CACHE, DYNAMIC_CACHE = "float", "C8", "C8_DYNAMIC"
KV_CACHES = {
    STATIC_CACHE: "int8 keys and values with a static scale for each channel, of calibration",
    DYNAMIC_CACHE: "int8 keys and values scaled per token at run time",
}
FLOAT_BIAS, IN_BIAS = StaticInt8(per_channel=False), StaticInt8(False, folds_bias=True)
_HALF_EVEN = MxTokens("mxfp4_cann0")  # MindIE-SD asks the operator for rint, vllm-ascend for round
MULTIPLIED = StaticInt8(False, folds_bias=True, multiplies=True)
_GROUPED = ("group_size", "symmetric")
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
_PER_CHANNEL = {"group_size": 0, "symmetric": True}
_MX_OPS = "npu_dynamic_mx_quant, npu_quant_matmul"


def _golden_stick(*served_by: str, kernels: str, **more: Any) -> Held:
    return Held("golden-stick", served_by, kernels, **more)


def _ascend(*served_by: str, kernels: str = "", **more: Any) -> Held:
    missing = () if served_by else (_NONE,)
    return Held("ascend", served_by, kernels, missing, **more)


def _mindie_sd(kernels: str, smooths: bool = True, **more: Any) -> Held:
    places = (Fold.MUL_SCALE, Fold.NORM) if smooths else (Fold.NORM,)
    folds = dict.fromkeys(places, more.pop("activation", None))
    scales = more.pop("scale_type", ScaleType.MODEL)
    return Held("mindie-sd", (_MINDIE_SD,), kernels, scale_type=scales, folds=folds, **more)


def _compressed_tensors(*served_by: str, kernels: str, **more: Any) -> Held:
    scales = ScaleType.MODEL
    return Held("compressed-tensors", (_VLLM, *served_by), kernels, scale_type=scales, **more)


def _wide_compressed_tensors(*served_by: str, kernels: str, **more: Any) -> Held:
    """Of schemes whose inputs are quantized, too: vLLM holds their scales in float32."""
    return _compressed_tensors(*served_by, kernels=kernels, float32_scales=True, **more)


_ROWS = (
    Scheme(
        "W8A8",
        AffineFormat(8),
        StaticInt8(),
        "int8 weights per channel, static int8 activations per tensor",
        (
            _golden_stick(
                _NATIVE,
                _MINDFORMERS,
                kernels="QuantV2, QuantBatchMatmul",
                folds={Fold.INPUT_SCALE: None, Fold.NORM: FLOAT_BIAS},
            ),
            _ascend(_VLLM_ASCEND, kernels=_STATIC_OPS, folds={Fold.NORM: MULTIPLIED}),
            _wide_compressed_tensors(kernels="cutlass_scaled_mm", folds={Fold.NORM: FLOAT_BIAS}),
            _mindie_sd(_STATIC_OPS, scale_type=ScaleType.FLOAT32, activation=IN_BIAS),
        ),
    ),
    Scheme(
        "W8A8_DYNAMIC",
        AffineFormat(8),
        PerToken(8),
        "int8 weights per channel, int8 activations scaled per token at run time",
        (
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
    ),
    Scheme(
        "W8A8_PER_TENSOR",
        AffineFormat(8, per_tensor=True),
        IN_BIAS,
        "int8 weights per tensor, static int8 activations per tensor",
        (_mindie_sd(_STATIC_OPS, scale_type=ScaleType.FLOAT32),),
    ),
    Scheme(
        "W8A8_PER_CHANNEL",
        AffineFormat(8),
        IN_BIAS,
        "W8A8 with one input scale and the bias in quant_bias, by MindIE-SD's longer name",
        (_mindie_sd(_STATIC_OPS, scale_type=ScaleType.FLOAT32),),
    ),
    Scheme(
        "W8A8_MIX",
        AffineFormat(8),
        Phased(multiplies=True),
        "W8A8_DYNAMIC in prefill and static W8A8 in decode, from one int8 weight (PDMIX)",
        (
            _ascend(
                _VLLM_ASCEND,
                kernels=f"npu_quantize in decode, {_INT8_OPS}",
                scale_type=ScaleType.MODEL,
            ),
        ),
    ),
    Scheme(
        "W8A8S",
        AffineFormat(8),
        IN_BIAS,
        "W8A8 of which most weights need four bits, for sparse-compress compress",
        (Held("ascend", (), "", (_COMPRESSED,), folds={Fold.NORM: IN_BIAS}),),
        algorithm="low_bits",
    ),
    Scheme(
        "W8A8_TIMESTEP",
        AffineFormat(8),
        Timestep(),
        "int8 weights, int8 activations static or per token as each timestep of a diffusion model",
    ),
    Scheme(
        "W8A16",
        AffineFormat(8),
        Float(),
        "int8 weights per channel or per group, float activations",
        (
            _ascend(
                _VLLM_ASCEND,
                kernels=_WEIGHT_OP,
                scale_type=ScaleType.MODEL,
                only={"group_size": 0},
            ),
            _compressed_tensors(kernels="marlin, machete"),
            _mindie_sd(_WEIGHT_OP, smooths=False, only=_PER_CHANNEL),
        ),
        options=_GROUPED,
    ),
    Scheme(
        "W4A16",
        AffineFormat(4, group_size=128),
        Float(),
        "int4 weights per group or per channel, float activations",
        (
            _compressed_tensors(kernels="marlin, machete"),
            _mindie_sd(_WEIGHT_OP, smooths=False, only=_PER_CHANNEL),
        ),
        options=_GROUPED,
    ),
    Scheme(
        "W4A8_DYNAMIC",
        AffineFormat(4),
        PerToken(8),
        "int4 weights per channel, int8 activations per token",
        (
            _ascend(
                _OLD_VLLM_ASCEND,
                kernels=_WEIGHT_OP,
                scale_type=ScaleType.MODEL,
            ),
        ),
        options=("group_size",),
    ),
    Scheme(
        "W4A4_DYNAMIC",
        AffineFormat(4),
        PerToken(4),
        "int4 weights per channel, int4 activations per token",
        (
            _ascend(_VLLM_ASCEND, kernels=_INT8_OPS),
            _mindie_sd(_INT8_OPS, smooths=False),
        ),
    ),
    Scheme(
        "W4A4_FLATQUANT_DYNAMIC",
        AffineFormat(4),
        PerToken(4),
        "W4A4_DYNAMIC of inputs that a trained Kronecker transform has flattened",
        (_ascend(_VLLM_ASCEND, kernels="npu_kronecker_quant, npu_quant_matmul"),),
        algorithm="flatquant",
    ),
    Scheme(
        "W8A8FP8_DYNAMIC",
        Float8Format(),
        PerTokenFloat8(),
        "float8 e4m3 weights per channel and activations per token",
        (
            _ascend(_VLLM_ASCEND, kernels=_INT8_OPS),
            _wide_compressed_tensors(kernels="cutlass_scaled_mm"),
        ),
    ),
    Scheme(
        "W8A8FP8_BLOCK",
        Float8BlockFormat(),
        GroupFloat8(),
        "float8 e4m3 weights per block of 128 x 128, activations per 128 channels of a token",
        (_wide_compressed_tensors(kernels="deep_gemm, w8a8_block_fp8_matmul"),),
    ),
    Scheme(
        "W8A8_MXFP8",
        MxFormat("mxfp8_msmodelslim"),
        MxTokens("mxfp8_cann0"),
        "MXFP8 weights and activations, blocks of 32",
        (_ascend(_VLLM_ASCEND, kernels=_MX_OPS), _mindie_sd(_MX_OPS, scale_type=ScaleType.FLOAT32)),
        options=("rule",),
    ),
    Scheme(
        "W4A8_MXFP",
        MxFormat("mxfp4_msmodelslim", multiple=64),
        MxTokens("mxfp8_cann0"),
        "MXFP4 weights, MXFP8 activations, blocks of 32",
        (_ascend(_VLLM_ASCEND, kernels=_MX_OPS),),
        options=("rule",),
    ),
    Scheme(
        "W4A4_MXFP4",
        MxFormat("mxfp4_msmodelslim", multiple=2),
        MxTokens("mxfp4_cann0_round"),
        "MXFP4 weights and activations, blocks of 32",
        (
            _ascend(_VLLM_ASCEND, kernels=_MX_OPS),
            _mindie_sd(_MX_OPS, scale_type=ScaleType.FLOAT32, activation=_HALF_EVEN),
        ),
        options=("rule",),
    ),
    Scheme(
        "W4A4_MXFP4_DUALSCALE",
        DualMxFormat("mxfp4_msmodelslim"),
        DualMxTokens("mxfp4_cann0"),
        "MXFP4 under a second scale for each 512 inputs",
        (_mindie_sd(_MX_OPS, scale_type=ScaleType.FLOAT32, only={"dual_block_size": 512}),),
        options=("rule", "dual_block_size"),
    ),
    Scheme(
        "W4A4_MXFP4_SVD",
        MxFormat("mxfp4_msmodelslim", multiple=2),
        MxTokens("mxfp4_cann0_round"),
        "W4A4_MXFP4 beside a float branch of low rank",
        (_ascend(),),
        algorithm="svd",
    ),
    Scheme(
        "W16A16S",
        FloatFormat(),
        Float(),
        "float weights, a share of them zero and most others of two mantissa bits",
        (_ascend(scale_type=ScaleType.MODEL),),
        algorithm="admm",
    ),
)
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ROWS}


def get_scheme(name: str, format: str = "", fold: Fold | None = None, /, **chosen: Any) -> Scheme:
    """The scheme of that name, as one format holds it.

    Args:
        name: a name from ``SCHEMES``.
        format: a checkpoint format; "" is the first that a runtime serves, else the first.
        fold: where a smoothing vector goes; None is the format's first choice.
        chosen: other options of its weights than the row's: ``group_size`` (0 is per-channel),
            ``symmetric``, ``rule`` or ``dual_block_size``.

    Raises:
        MsQuantError: there is no such scheme, it has no such option or value, or the format
            cannot hold it or the smoothing there.
    """
    if name not in SCHEMES:
        raise MsQuantError(f"scheme {name!r} is unknown, expected one of {', '.join(SCHEMES)}")
    scheme = _with_options(SCHEMES[name], chosen)
    held = [row for row in scheme.held if not format or row.format == format]
    fitting = [row for row in held if _holds(row, scheme)]
    if format and not fitting:
        raise MsQuantError(f"scheme {name}: {why_not_held(name, format)}")
    if not fitting:
        return replace(scheme, held=())
    row = next((row for row in fitting if row.served_by), fitting[0])
    if fold is not None and fold not in row.folds:
        places = " or ".join(place.value for place in row.folds)
        raise MsQuantError(
            f"fold {fold.value}: {row.format} checkpoints of scheme {name} cannot hold a "
            f"smoothing vector there, expected {places}"
        )
    fold = fold or next(iter(row.folds))
    activation = row.folds[fold]
    row = replace(row, folds={fold: activation})
    return replace(scheme, held=(row,), activation=activation or scheme.activation)


def held_by(format: str) -> list[str]:
    """The schemes that a format holds."""
    rows = SCHEMES.values()
    return [row.name for row in rows if format in {held.format for held in row.held}]


def why_not_held(name: str, format: str = "") -> str:
    """Why checkpoints of a format, or of any, do not hold a scheme with its options."""
    rows = [row for row in SCHEMES[name].held if row.format == format or not format]
    for row in rows:
        wanted = ", ".join(f"{option} {value}" for option, value in row.only.items())
        return f"{row.format} checkpoints hold it only with {wanted}"
    able = ", ".join(row.format for row in SCHEMES[name].held) or "none"
    return f"no {format} checkpoint can hold it, expected one of {able}"


def served_formats(name: str, /, **chosen: Any) -> list[str]:
    """The formats in which some runtime serves a scheme with these options."""
    return [format for format, row in _fitting(name, chosen).items() if row.served_by]


def holding_formats(name: str, /, **chosen: Any) -> list[str]:
    """The formats that hold a scheme with these options."""
    return list(_fitting(name, chosen))


def _fitting(name: str, chosen: Mapping[str, Any]) -> dict[str, Held]:
    scheme = _with_options(SCHEMES[name], chosen)
    return {row.format: row for row in scheme.held if _holds(row, scheme)}


def _holds(held: Held, scheme: Scheme) -> bool:
    chosen = scheme.chosen
    return all(chosen[option] == value for option, value in held.only.items())


def _with_options(scheme: Scheme, chosen: Mapping[str, Any]) -> Scheme:
    for key, value in chosen.items():
        if key not in scheme.options:
            options = " or ".join(scheme.options) or "no option"
            raise MsQuantError(f"scheme {scheme.name} takes no {key}, expected {options}")
        values = [v for v in VALUES[key] if key != "rule" or _same_element(scheme, v)]
        if not any(type(value) is type(known) and value == known for known in values):
            listed = ", ".join(map(str, values))
            raise MsQuantError(
                f"{key} is {value!r}, expected one of {listed} for scheme {scheme.name}"
            )
    if not chosen:
        return scheme
    if scheme.name == "W4A8_DYNAMIC":
        size = chosen["group_size"]
        return replace(scheme, weight=TwoLevelFormat(size) if size else AffineFormat(4))
    weight: Any = scheme.weight  # a record, which its protocol cannot say
    scheme = replace(scheme, weight=replace(weight, **chosen))
    if isinstance(scheme.activation, DualMxTokens) and "dual_block_size" in chosen:
        same = replace(scheme.activation, size=chosen["dual_block_size"])
        return replace(scheme, activation=same)
    return scheme


def as_value(name: str, value: Any) -> Any:
    """An option's value; text is read as the one that it spells, if there is one."""
    spelled = {str(possible).lower(): possible for possible in VALUES[name]}
    return spelled.get(value.lower(), value) if isinstance(value, str) else value


def _same_element(scheme: Scheme, rule: str) -> bool:
    assert isinstance(scheme.weight, MxFormat | DualMxFormat)
    return RULES[rule].element is RULES[scheme.weight.rule].element
