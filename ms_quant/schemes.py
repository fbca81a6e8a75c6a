"""The schemes, as data. A new one is a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ms_quant.errors import MsQuantError
from ms_quant.numerics.activation import (
    ActivationFormat,
    DualMxTokens,
    Float,
    MxTokens,
    PerToken,
    PerTokenFloat8,
    Phased,
    StaticInt8,
)
from ms_quant.numerics.float_grid import DualMxFormat, Float8Format, MxFormat
from ms_quant.numerics.grid import AffineFormat, TwoLevelFormat, WeightFormat
from ms_quant.numerics.mx_rules import RULES
from ms_quant.numerics.timestep import Timestep
from ms_quant.spec import ScaleType, Scheme

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
_GROUPED = ("group_size", "symmetric")
_NATIVE = "vllm-mindspore Native (--quantization golden-stick)"
_MINDFORMERS = "vllm-mindspore MindFormers backend"
_VLLM_ASCEND = "vllm-ascend (--quantization ascend)"
_OLD_VLLM_ASCEND = "vllm-ascend up to 0.25 (--quantization ascend)"
_NONE = "no runtime is known to serve it from these tensors yet; ms-quant eval and generate run it"


def _ascend(
    name: str,
    weight: WeightFormat,
    activation: ActivationFormat,
    summary: str,
    served_by: tuple[str, ...] = (_VLLM_ASCEND,),
    **more: Any,
) -> Scheme:
    """A row whose default flavour is ascend."""
    missing = () if served_by else (_NONE,)
    return Scheme(name, weight, activation, summary, "ascend", served_by, missing, **more)


_ROWS = (
    Scheme(
        "W8A8",
        AffineFormat(8),
        StaticInt8(),
        "int8 weights per channel, static int8 activations per tensor",
        "golden-stick",
        (_NATIVE, _MINDFORMERS),
    ),
    Scheme(
        "W8A8_DYNAMIC",
        AffineFormat(8),
        PerToken(8),
        "int8 weights per channel, int8 activations scaled per token at run time",
        "golden-stick",
        (_MINDFORMERS,),
        (f"{_NATIVE} does not serve W8A8_DYNAMIC",),
        ScaleType.BFLOAT16,
    ),
    _ascend(
        "W8A8_PER_TENSOR",
        AffineFormat(8, per_tensor=True),
        StaticInt8(per_channel=False),
        "int8 weights per tensor, static int8 activations per tensor",
        (),
    ),
    _ascend(
        "W8A8_PER_CHANNEL",
        AffineFormat(8),
        StaticInt8(per_channel=False),
        "W8A8 with one input scale and the bias in quant_bias, as MindIE-SD and msModelSlim",
        (),
    ),
    _ascend(
        "W8A8_MIX",
        AffineFormat(8),
        Phased(),
        "W8A8_DYNAMIC in prefill and static W8A8 in decode, from one int8 weight (PDMIX)",
        scale_type=ScaleType.MODEL,
    ),
    Scheme(
        "W8A8_TIMESTEP",
        AffineFormat(8),
        Timestep(),
        "int8 weights, int8 activations static or per token as each timestep of a diffusion model",
        "",
        (),
        ('no checkpoint is written; ms_quant.quantize(network, "W8A8_TIMESTEP", ...) runs it',),
    ),
    _ascend(
        "W8A16",
        AffineFormat(8),
        Float(),
        "int8 weights per channel or per group, float activations",
        scale_type=ScaleType.MODEL,
        options=_GROUPED,
    ),
    _ascend(
        "W4A16",
        AffineFormat(4, group_size=128),
        Float(),
        "int4 weights per group or per channel, float activations",
        (),
        scale_type=ScaleType.MODEL,
        options=_GROUPED,
    ),
    _ascend(
        "W4A8_DYNAMIC",
        AffineFormat(4),
        PerToken(8),
        "int4 weights per channel, int8 activations per token",
        (_OLD_VLLM_ASCEND,),
        scale_type=ScaleType.MODEL,
        options=("group_size",),
    ),
    _ascend(
        "W4A4_DYNAMIC",
        AffineFormat(4),
        PerToken(4),
        "int4 weights per channel, int4 activations per token",
    ),
    _ascend(
        "W4A4_FLATQUANT_DYNAMIC",
        AffineFormat(4),
        PerToken(4),
        "W4A4_DYNAMIC of inputs that a trained Kronecker transform has flattened",
        algorithm="flatquant",
    ),
    _ascend(
        "W8A8FP8_DYNAMIC",
        Float8Format(),
        PerTokenFloat8(),
        "float8 e4m3 weights per channel and activations per token",
    ),
    _ascend(
        "W8A8_MXFP8",
        MxFormat("mxfp8_msmodelslim"),
        MxTokens("mxfp8_cann0"),
        "MXFP8 weights and activations, blocks of 32",
        options=("rule",),
    ),
    _ascend(
        "W4A8_MXFP",
        MxFormat("mxfp4_msmodelslim", multiple=64),
        MxTokens("mxfp8_cann0"),
        "MXFP4 weights, MXFP8 activations, blocks of 32",
        options=("rule",),
    ),
    _ascend(
        "W4A4_MXFP4",
        MxFormat("mxfp4_msmodelslim", multiple=2),
        MxTokens("mxfp4_cann0_round"),
        "MXFP4 weights and activations, blocks of 32",
        options=("rule",),
    ),
    _ascend(
        "W4A4_MXFP4_DUALSCALE",
        DualMxFormat("mxfp4_msmodelslim"),
        DualMxTokens("mxfp4_cann0"),
        "MXFP4 under a second scale for each 512 inputs",
        (),
        options=("rule", "dual_block_size"),
    ),
    _ascend(
        "W4A4_MXFP4_SVD",
        MxFormat("mxfp4_msmodelslim", multiple=2),
        MxTokens("mxfp4_cann0_round"),
        "W4A4_MXFP4 beside a float branch of low rank",
        (),
        algorithm="svd",
    ),
)
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ROWS}


def get_scheme(name: str, **chosen: Any) -> Scheme:
    """The scheme of that name.

    Args:
        name: a name from ``SCHEMES``.
        chosen: other options of its weights than the row's: ``group_size`` (0 is per-channel),
            ``symmetric``, ``rule`` or ``dual_block_size``.

    Raises:
        MsQuantError: there is no such scheme, or it has no such option or value.
    """
    if name not in SCHEMES:
        raise MsQuantError(f"scheme {name!r} is unknown, expected one of {', '.join(SCHEMES)}")
    scheme = SCHEMES[name]
    for key, value in chosen.items():
        if key not in scheme.options:
            options = " or ".join(scheme.options) or "no option"
            raise MsQuantError(f"scheme {name} takes no {key}, expected {options}")
        values = [v for v in VALUES[key] if key != "rule" or _same_element(scheme, v)]
        if not any(type(value) is type(known) and value == known for known in values):
            listed = ", ".join(map(str, values))
            raise MsQuantError(f"{key} is {value!r}, expected one of {listed} for scheme {name}")
    if not chosen:
        return scheme
    if name == "W8A16" and chosen.get("group_size"):
        reason = f"{_VLLM_ASCEND} reads W8A16 with one scale a row only"
        scheme = replace(scheme, served_by=(), not_served_by=(reason,))
    if name == "W4A8_DYNAMIC":
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
