"""The ascend format, as vllm-ascend reads it and msModelSlim writes it.

docs/ascend_format.md states what its files hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, UnsupportedError
from ms_quant.files.reader import Checkpoint
from ms_quant.files.writer import TensorPlan
from ms_quant.formats import kv_cache
from ms_quant.formats.ascend.codes import codes_of, has_scale_bias
from ms_quant.formats.ascend.leeway import LEEWAY
from ms_quant.formats.ascend.reading import read_linear
from ms_quant.formats.ascend.tensors import FLOAT32, WITH_CODES, parts, slices_of
from ms_quant.formats.flat_description import kinds
from ms_quant.formats.format import CheckpointFormat, Kinds, Options, Tensors, is_there
from ms_quant.models.block_spec import LinearGroup, LinearSpec
from ms_quant.models.config import ModelConfig
from ms_quant.numerics.activation import StaticInt8
from ms_quant.numerics.float_grid import FloatFormat
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.rotation import balanced_factors
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan
from ms_quant.schemes.records import Scheme

DESCRIPTION, VERSION = "quant_model_description.json", "1.0.0"
TRANSFORM_MULTIPLE = 8
MODEL_TYPES = (  # the writers' order, and where the ones that it lacks belong
    "W16A16S",
    "W8A16",
    "W8A8_DYNAMIC",
    "W8A8_MIX",
    "W8A8",
    "W8A8S",
    "W8A8FP8_DYNAMIC",
    "W8A8_MXFP8",
    "W4A8_DYNAMIC",
    "W4A8_MXFP",
    "W4A4_DYNAMIC",
    "W4A4_FLATQUANT_DYNAMIC",
    "W4A4_MXFP4",
    "W4A4_MXFP4_SVD",
)
EXPERTS = (
    "W8A8_DYNAMIC",
    "W4A8_DYNAMIC",
    "W8A8FP8_DYNAMIC",
    "W8A8_MXFP8",
    "W4A8_MXFP",
    "W4A4_MXFP4",
)
"""What vllm-ascend registers for experts, of what this format holds."""
HEAD = "lm_head.weight"
BRANCH = ("svd_lowrank_l1", "svd_lowrank_l2")
ADDED = ("left_trans", "right_trans", "clip_ratio", *BRANCH)
FLOATS = frozenset({"bias", *BRANCH})


def check(layer: LayerPlan, group: LinearGroup, spec: LinearSpec, name: str) -> None:
    """Refuses a linear that cannot be stored.

    Raises:
        MsQuantError: the scheme's input has a scale for each channel, or the shape cannot be
            packed or divided over ranks; names the weight.
    """
    activation = layer.scheme.activation
    if isinstance(activation, StaticInt8) and activation.per_channel:
        raise UnsupportedError(f"the ascend format cannot hold scheme {layer.scheme.name}")
    codes_of(layer.scheme, layer.dtype).check(*spec.shape, name)
    if layer.scheme.algorithm == "flatquant":
        if spec.in_features % TRANSFORM_MULTIPLE:
            raise BadFileError(
                f"{name}: {spec.in_features} inputs, expected a multiple of {TRANSFORM_MULTIPLE} "
                "for a Kronecker transform"
            )
        balanced_factors(spec.in_features, name)
    slices = slices_of(group)
    if has_scale_bias(layer.scheme) and spec.in_features % slices:
        raise BadFileError(
            f"{name}: {spec.in_features} inputs, expected a multiple of {slices}: scale_bias of a "
            "row-parallel linear has a sum for each rank"
        )


def why_not_run(layer: LayerPlan, group: LinearGroup, spec: LinearSpec) -> str:
    """Why vllm-ascend fails on a linear, or ""."""
    if not group.routed:
        return ""
    name = layer.scheme.name
    if name not in EXPERTS:
        return (
            f"is {name}, expected one of {', '.join(EXPERTS)}: vllm-ascend has no other methods "
            "for experts"
        )
    if has_scale_bias(layer.scheme) and layer.scheme.weight.group_size:
        return (
            f"has groups of {layer.scheme.weight.group_size}, expected group_size 0: vllm-ascend "
            f"takes experts of {name} per channel"
        )
    return ""


def linear_plan(layer: LayerPlan, group: LinearGroup, spec: LinearSpec) -> Tensors:
    return {key: (part.dtype, part.shape) for key, part in parts(layer, group, spec.shape).items()}


def linear_tensor(
    layer: LayerPlan, group: LinearGroup, linear: QuantizedLinear, suffix: str
) -> np.ndarray:
    """One tensor of a quantized linear, as stored.

    Raises:
        MsQuantError: the linear has what no tensor of the plan holds.
    """
    rows, columns = linear.weight.shape
    made = parts(layer, group, (rows, columns))
    homeless = ({"smooth", *ADDED} & linear.arrays().keys()) - made.keys()
    if homeless:
        raise UnsupportedError(
            f"the ascend format has no place for {min(homeless)} of a linear here"
        )
    return made[suffix].make(linear)


def describe(plan: Plan, tensors: Sequence[TensorPlan]) -> dict[str, Any]:
    """Tensor name to scheme, a head that is none included, and what is said of the whole model."""
    quantized, result = set(plan.quantized()), {}
    for tensor in tensors:
        suffix = tensor.name.rpartition(".")[2]
        scheme = plan.quantized_layer(tensor.part[0]).scheme if tensor.part else None
        kind = scheme.name if scheme and not _is_float(scheme, suffix) else "FLOAT"
        result[tensor.name] = kind
    if not plan.config.has_head:
        result[HEAD] = "FLOAT"
    return {
        **result,
        **kv_cache.entries(plan),
        **kv_cache.global_entries(plan),
        "version": VERSION,
        "model_quant_type": _model_type(plan) if quantized else "FLOAT",
        "group_size": _group_size(plan),
        "metadata": {},
        "optional": {},
    }


def _is_float(scheme: Scheme, suffix: str) -> bool:
    """Whether a tensor of a quantized linear is called so; a bias beside float weights is not."""
    return suffix in FLOATS and not isinstance(scheme.weight, FloatFormat)


def _model_type(plan: Plan) -> str:
    """The scheme that stands for the model: the last of those there are in the runtime's order; one
    that it does not know only where there is no other."""
    names = [layer.scheme.name for layer in plan.distinct]
    return next((name for name in reversed(MODEL_TYPES) if name in names), names[0])


def _group_size(plan: Plan) -> int:
    """Of the last group that has one."""
    sizes = [layer.scheme.weight.group_size for layer in plan.layers.values() if layer]
    return next((size for size in reversed(sizes) if size), 0)


def _kinds(config: ModelConfig, description: Mapping[str, Any], where: Path) -> Kinds:
    linears = kv_cache.without_attention(description)
    return kinds("ascend", FLOATS, config, linears, where, aliases=LEEWAY.aliases)


def scheme_options(
    config: ModelConfig, description: Mapping[str, Any], checkpoint: Checkpoint
) -> Options:
    """The size of groups and the rank of branches, as a linear's tensors are."""
    return lambda path, spec: _options(spec, description, checkpoint, path)


def _options(
    spec: LinearSpec, description: Mapping[str, Any], checkpoint: Checkpoint, path: str
) -> dict[str, Any]:
    options: dict[str, Any] = {}
    columns = spec.in_features
    shapes = {
        suffix: checkpoint.info(f"{path}.{suffix}").shape
        for suffix in ("weight_scale", "weight_scale_second", BRANCH[0])
        if f"{path}.{suffix}" in checkpoint
    }
    scale = shapes.get("weight_scale_second", shapes.get("weight_scale", ()))
    if len(scale) == 2 and scale[1] > 1 and columns % scale[1] == 0:
        options["group_size"] = columns // scale[1]
    elif len(scale) == 2:  # one group, or none
        options["group_size"] = columns if description.get("group_size") == columns else 0
    if len(shapes.get(BRANCH[0], ())) == 2:
        options["svd.rank"] = shapes[BRANCH[0]][0]
    return options


FORMAT = CheckpointFormat(
    name="ascend",
    shown=DESCRIPTION,
    find=is_there(DESCRIPTION),
    document=lambda plan: DESCRIPTION,
    weights="quant_model_weights",
    index="quant_model_weights.safetensors.index.json",
    linear_plan=linear_plan,
    linear_tensor=linear_tensor,
    read_linear=read_linear,
    describe=describe,
    kinds=_kinds,
    scheme_options=scheme_options,
    check=check,
    why_not_run=why_not_run,
    with_codes=WITH_CODES,
    bias_dtype=lambda layer, path: FLOAT32,
    holds_cache=True,
    leeway=LEEWAY,
)
