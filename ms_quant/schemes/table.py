"""The schemes, as data. A new one is a row; ``support`` says which checkpoint formats hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ms_quant.errors import BadArgumentError
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
from ms_quant.numerics.grid import AffineFormat, TwoLevelFormat, WeightFormat
from ms_quant.numerics.mx_rules import RULES
from ms_quant.numerics.timestep import Timestep
from ms_quant.schemes.records import Scheme

VALUES: dict[str, tuple] = {
    "group_size": (0, 32, 64, 128, 256),
    "symmetric": (True, False),
    "rule": tuple(RULES),
    "dual_block_size": tuple(32 * 2**i for i in range(6)),
}
FLOAT_CACHE, STATIC_CACHE, DYNAMIC_CACHE = "float", "C8", "C8_DYNAMIC"
ABSMAX_CACHE = "C8_ABSMAX"
KV_CACHES = {
    STATIC_CACHE: "int8 keys and values with a static scale for each channel, of calibration; of "
    "latent attention one for each head's queries and for the latent vectors, of recall windows",
    ABSMAX_CACHE: "the same of latent attention, its scales of largest magnitudes",
    DYNAMIC_CACHE: "int8 keys and values scaled per token at run time",
}
IN_BIAS = StaticInt8(False, folds_bias=True)
_GROUPED = ("group_size", "symmetric")


def _two_levels(chosen: Mapping[str, Any]) -> WeightFormat:
    """int4 per group inside int8 per channel; without groups int4 per channel."""
    size = chosen["group_size"]
    return TwoLevelFormat(size) if size else AffineFormat(4)


_ROWS = (
    Scheme(
        "W8A8",
        AffineFormat(8),
        StaticInt8(),
        "int8 weights per channel, static int8 activations per tensor",
    ),
    Scheme(
        "W8A8_DYNAMIC",
        AffineFormat(8),
        PerToken(8),
        "int8 weights per channel, int8 activations scaled per token at run time",
    ),
    Scheme(
        "W8A8_PER_TENSOR",
        AffineFormat(8, per_tensor=True),
        IN_BIAS,
        "int8 weights per tensor, static int8 activations per tensor",
    ),
    Scheme(
        "W8A8_PER_CHANNEL",
        AffineFormat(8),
        IN_BIAS,
        "W8A8 with one input scale and the bias in quant_bias, by MindIE-SD's longer name",
    ),
    Scheme(
        "W8A8_MIX",
        AffineFormat(8),
        Phased(multiplies=True),
        "W8A8_DYNAMIC in prefill and static W8A8 in decode, from one int8 weight (PDMIX)",
    ),
    Scheme(
        "W8A8S",
        AffineFormat(8),
        IN_BIAS,
        "W8A8 of which most weights need four bits, for sparse-compress compress",
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
        options=_GROUPED,
    ),
    Scheme(
        "W4A16",
        AffineFormat(4, group_size=128),
        Float(),
        "int4 weights per group or per channel, float activations",
        options=_GROUPED,
    ),
    Scheme(
        "W4A8_DYNAMIC",
        AffineFormat(4),
        PerToken(8),
        "int4 weights per channel, int8 activations per token",
        options=("group_size",),
        weight_with=_two_levels,
    ),
    Scheme(
        "W4A4_DYNAMIC",
        AffineFormat(4),
        PerToken(4),
        "int4 weights per channel, int4 activations per token",
    ),
    Scheme(
        "W4A4_FLATQUANT_DYNAMIC",
        AffineFormat(4),
        PerToken(4),
        "W4A4_DYNAMIC of inputs that a trained Kronecker transform has flattened",
        algorithm="flatquant",
    ),
    Scheme(
        "W8A8FP8_DYNAMIC",
        Float8Format(),
        PerTokenFloat8(),
        "float8 e4m3 weights per channel and activations per token",
    ),
    Scheme(
        "W8A8FP8_BLOCK",
        Float8BlockFormat(),
        GroupFloat8(),
        "float8 e4m3 weights per block of 128 x 128, activations per 128 channels of a token",
    ),
    Scheme(
        "W8A8_MXFP8",
        MxFormat("mxfp8_msmodelslim"),
        MxTokens("mxfp8_cann0"),
        "MXFP8 weights and activations, blocks of 32",
        options=("rule",),
    ),
    Scheme(
        "W4A8_MXFP",
        MxFormat("mxfp4_msmodelslim", multiple=64),
        MxTokens("mxfp8_cann0"),
        "MXFP4 weights, MXFP8 activations, blocks of 32",
        options=("rule",),
    ),
    Scheme(
        "W4A4_MXFP4",
        MxFormat("mxfp4_msmodelslim", multiple=2),
        MxTokens("mxfp4_cann0_round"),
        "MXFP4 weights and activations, blocks of 32",
        options=("rule",),
    ),
    Scheme(
        "W4A4_MXFP4_DUALSCALE",
        DualMxFormat("mxfp4_msmodelslim"),
        DualMxTokens("mxfp4_cann0"),
        "MXFP4 under a second scale for each 512 inputs",
        options=("rule", "dual_block_size"),
    ),
    Scheme(
        "W4A4_MXFP4_SVD",
        MxFormat("mxfp4_msmodelslim", multiple=2),
        MxTokens("mxfp4_cann0_round"),
        "W4A4_MXFP4 beside a float branch of low rank",
        algorithm="svd",
    ),
    Scheme(
        "W16A16S",
        FloatFormat(),
        Float(),
        "float weights, a share of them zero and most others of two mantissa bits",
        algorithm="admm",
    ),
)
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ROWS}


def get_scheme(name: str, /, **chosen: Any) -> Scheme:
    """The scheme of that name.

    Args:
        name: a name from ``SCHEMES``.
        chosen: other options of its weights than the row's: ``group_size`` (0 is per-channel),
            ``symmetric``, ``rule`` or ``dual_block_size``.

    Raises:
        MsQuantError: there is no such scheme, or it has no such option or value.
    """
    if name not in SCHEMES:
        raise BadArgumentError(f"scheme {name!r} is unknown, expected one of {', '.join(SCHEMES)}")
    scheme = SCHEMES[name]
    for key, value in chosen.items():
        _check_option(scheme, key, value)
    if not chosen:
        return scheme
    if scheme.weight_with is not None:
        return replace(scheme, weight=scheme.weight_with(chosen))
    weight: Any = scheme.weight  # a record, which its protocol cannot say
    scheme = replace(scheme, weight=replace(weight, **chosen))
    if isinstance(scheme.activation, DualMxTokens) and "dual_block_size" in chosen:
        same = replace(scheme.activation, size=chosen["dual_block_size"])
        return replace(scheme, activation=same)
    return scheme


def taken_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Of options that are meant for several schemes, those that one of them takes."""
    return {key: value for key, value in options.items() if key in SCHEMES[name].options}


def _check_option(scheme: Scheme, key: str, value: Any) -> None:
    if key not in scheme.options:
        options = " or ".join(scheme.options) or "no option"
        raise BadArgumentError(f"scheme {scheme.name} takes no {key}, expected {options}")
    values = [v for v in VALUES[key] if key != "rule" or _same_element(scheme, v)]
    if not any(type(value) is type(known) and value == known for known in values):
        listed = ", ".join(map(str, values))
        raise BadArgumentError(
            f"{key} is {value!r}, expected one of {listed} for scheme {scheme.name}"
        )


def as_value(name: str, value: Any) -> Any:
    """An option's value; text is read as the one that it spells, if there is one."""
    spelled = {str(possible).lower(): possible for possible in VALUES[name]}
    return spelled.get(value.lower(), value) if isinstance(value, str) else value


def _same_element(scheme: Scheme, rule: str) -> bool:
    assert isinstance(scheme.weight, MxFormat | DualMxFormat)
    return RULES[rule].element is RULES[scheme.weight.rule].element
