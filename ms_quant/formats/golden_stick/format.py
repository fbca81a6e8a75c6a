"""The golden-stick format: what its files hold, as docs/golden_stick_format.md states it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, UnsupportedError
from ms_quant.files.reader import Checkpoint
from ms_quant.files.writer import TensorPlan
from ms_quant.formats.companions import model_config
from ms_quant.formats.flat_description import kinds
from ms_quant.formats.format import CheckpointFormat, Options, Tensors
from ms_quant.formats.golden_stick import int4
from ms_quant.formats.golden_stick.leeway import LEEWAY, check_extra, stated
from ms_quant.models.block_spec import LinearGroup, LinearSpec
from ms_quant.models.config import ModelConfig
from ms_quant.models.rotary_rows import RotaryRows
from ms_quant.numerics.grid import AffineFormat
from ms_quant.numerics.linear import QuantizedLinear, StaticActivation, int8_linear
from ms_quant.numerics.storage import weight_scale_dtype
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan

__all__ = ["DESCRIPTION", "FORMAT", "SHARD_PREFIX", "model_config", "static_linear"]

DESCRIPTION = "quantization_description.json"
SHARD_PREFIX = "quant-model"
BY_ROW = frozenset({"weight", "weight_scale", "weight_offset", "deq_scale", "quant_bias", "bias"})
INT8, INT32, FLOAT32 = np.dtype(np.int8), np.dtype(np.int32), np.dtype(np.float32)


def linear_plan(layer: LayerPlan, shape: tuple[int, int]) -> Tensors:
    """Suffix to (dtype, shape) of a quantized linear's tensors, without its bias."""
    out_features, in_features = shape
    if layer.scheme.name == "W8A8":
        return {
            "weight": (INT8, shape),
            "deq_scale": (FLOAT32, (out_features,)),
            "quant_bias": (INT32, (out_features,)),
            "input_scale": (layer.dtype, (in_features,)),
            "input_offset": (INT8, (in_features,)),
        }
    if layer.scheme.name == "W8A8_DYNAMIC":
        return {
            "weight": (INT8, shape),
            "weight_scale": (weight_scale_dtype(layer.dtype), (out_features,)),
        }
    if layer.scheme.name == int4.SCHEME:
        return int4.linear_plan(shape, layer.scheme.weight.group_size)
    raise UnsupportedError(f"golden-stick cannot hold scheme {layer.scheme.name}")


def linear_tensor(layer: LayerPlan, linear: QuantizedLinear, suffix: str) -> np.ndarray:
    """One tensor of a quantized linear, as stored."""
    if layer.scheme.name == int4.SCHEME:
        return int4.linear_tensor(linear, suffix)
    if suffix == "weight":
        return linear.weight
    if suffix == "weight_scale":
        return linear.weight_scale.astype(weight_scale_dtype(layer.dtype))
    if suffix == "deq_scale":
        return linear.deq_scale
    if suffix == "quant_bias":
        return linear.quant_bias
    if suffix == "input_scale":
        return linear.static.input_scale.astype(layer.dtype)
    return np.full(linear.weight.shape[1], linear.static.offset, np.int8)


def read_linear(
    layer: LayerPlan,
    group: LinearGroup,
    spec: LinearSpec,
    checkpoint: Checkpoint,
    path: str,
    bias: np.ndarray | None,
) -> QuantizedLinear:
    """The linear at a path. What it reads it checks: a wrong quant_bias is an error."""
    format = layer.scheme.weight
    if layer.scheme.name == int4.SCHEME:
        assert isinstance(format, AffineFormat)
        return int4.read_linear(format, checkpoint, path, bias)
    weight = checkpoint.read(f"{path}.weight")
    if layer.scheme.activation.dynamic:
        linear = int8_linear(weight, checkpoint.read_float32(f"{path}.weight_scale"), bias)
    else:
        linear = _static(layer, checkpoint, path, weight, bias)
    if layer.foreign:
        check_extra(checkpoint, path, linear)
    return linear


def _static(
    layer: LayerPlan, checkpoint: Checkpoint, path: str, weight: np.ndarray, bias: np.ndarray | None
) -> QuantizedLinear:
    return static_linear(
        path,
        weight,
        checkpoint.read_float32(f"{path}.deq_scale"),
        checkpoint.read(f"{path}.quant_bias"),
        checkpoint.read_float32(f"{path}.input_scale"),
        checkpoint.read(f"{path}.input_offset"),
        bias,
        foreign=layer.foreign,
    )


def static_linear(
    path: str,
    weight: np.ndarray,
    deq_scale: np.ndarray,
    quant_bias: np.ndarray,
    input_scale: np.ndarray,
    input_offset: np.ndarray,
    bias: np.ndarray | None,
    *,
    foreign: bool = False,
) -> QuantizedLinear:
    """A linear from the tensors of a static checkpoint, which must agree with each other.

    The split of ``deq_scale`` into an activation and a weight scale is not stored and does not
    matter: the activation scale is taken as 1. ``foreign``: others made it, and may have rounded
    quant_bias, which is then taken as it is.

    Raises:
        MsQuantError: offsets differ within the tensor, or quant_bias is not what the weight and
            the offset give.
    """
    if not input_offset.size:
        raise BadFileError(f"{path}.input_offset: is empty, expected one zero point an input")
    if (input_offset != input_offset[0]).any():
        raise BadFileError(f"{path}.input_offset: holds different values, expected one zero point")
    activation = StaticActivation(np.float32(1), int(input_offset[0]), input_scale)
    linear = int8_linear(weight, deq_scale, bias, activation)
    if foreign:
        return stated(linear, quant_bias, path)
    wrong = int(np.count_nonzero(linear.quant_bias != quant_bias))
    if wrong:
        raise BadFileError(
            f"{path}.quant_bias: {wrong} of {quant_bias.size} values differ from "
            "-input_offset * sum of the weight's row"
        )
    return linear


def describe(plan: Plan, tensors: Sequence[TensorPlan]) -> dict[str, Any]:
    """Tensor name to scheme, and the size of groups where there are any. All tensors of a module
    carry one value, its bias included.

    Raises:
        MsQuantError: groups are of several sizes, the runtime has one.
    """
    sizes = sorted({size for layer in plan.distinct if (size := layer.scheme.weight.group_size)})
    if len(sizes) > 1:
        raise UnsupportedError(
            f"group_size is {' and '.join(map(str, sizes))}, expected one for all experts: a "
            "golden-stick checkpoint states one"
        )
    entries: dict[str, Any] = {
        tensor.name: plan.quantized_layer(tensor.part[0]).scheme.name if tensor.part else "FLOAT"
        for tensor in tensors
    }
    return entries | ({int4.KEY: sizes[0]} if sizes else {})


def scheme_options(
    config: ModelConfig, description: Mapping[str, Any], checkpoint: Checkpoint
) -> Options:
    """The size of a linear's groups, as its scales are."""

    def options(path: str, spec: LinearSpec) -> dict[str, Any]:
        name = f"{path}.weight_scale"
        shape = checkpoint.info(name).shape if name in checkpoint else ()
        grouped = len(shape) == 2 and shape[1] and spec.in_features % shape[1] == 0
        return {int4.KEY: spec.in_features // shape[1]} if grouped else {}

    return options


def check(layer: LayerPlan, group: LinearGroup, spec: LinearSpec, name: str) -> None:
    """Refuses a linear that cannot be stored.

    Raises:
        MsQuantError: its rows do not make pairs of int4; names the weight.
    """
    if layer.scheme.name == int4.SCHEME and spec.out_features % 2:
        raise BadFileError(
            f"{name}: {spec.out_features} outputs, expected an even number to pack int4"
        )


def why_not_run(layer: LayerPlan, group: LinearGroup, spec: LinearSpec) -> str:
    """Why MindFormers fails on a linear, or ""."""
    if group.routed and not layer.scheme.activation.dynamic:
        return (
            f"is {layer.scheme.name}, expected W8A8_DYNAMIC or {int4.SCHEME}: MindFormers has no "
            "experts with static inputs"
        )
    if layer.scheme.name == int4.SCHEME and not group.routed:
        return (
            f"is {int4.SCHEME}, expected W8A8_DYNAMIC, W8A8 or float: MindFormers has int4 weights "
            "of routed experts only"
        )
    return ""


def stored_rows(config: ModelConfig, index: int, spec: LinearSpec) -> RotaryRows | None:
    """MindFormers turns halves and reorders rows of float models only; blocks that predict further
    tokens are read as those of a float model."""
    return spec.rotary_rows if index < config.num_layers else None


FORMAT = CheckpointFormat(
    name="golden-stick",
    shown=DESCRIPTION,
    find=lambda directory: sorted(directory.glob(f"*{DESCRIPTION}")),  # as the runtime looks
    document=lambda plan: DESCRIPTION,
    weights=SHARD_PREFIX,
    linear_plan=lambda layer, group, spec: linear_plan(layer, spec.shape),
    linear_tensor=lambda layer, group, linear, suffix: linear_tensor(layer, linear, suffix),
    read_linear=read_linear,
    describe=describe,
    kinds=partial(kinds, "golden-stick", ("bias",)),
    scheme_options=scheme_options,
    check=check,
    why_not_run=why_not_run,
    with_codes=frozenset({"weight", "quant_bias"}),
    stored_rows=stored_rows,
    by_row=BY_ROW,
    leeway=LEEWAY,
)
tensor_plans, description = FORMAT.tensor_plans, FORMAT.description
