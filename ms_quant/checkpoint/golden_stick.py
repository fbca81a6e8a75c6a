"""The golden-stick flavour: what its files hold, as docs/golden_stick_format.md states it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ms_quant.checkpoint.writer import TensorPlan
from ms_quant.errors import MsQuantError
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.storage import weight_scale_dtype
from ms_quant.plan import Plan

DESCRIPTION = "quantization_description.json"
SHARD_PREFIX = "quant-model"
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
INT8, INT32, FLOAT32 = np.dtype(np.int8), np.dtype(np.int32), np.dtype(np.float32)


def linear_plan(plan: Plan, shape: tuple[int, int]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Suffix to (dtype, shape) of a quantized linear's tensors, without its bias."""
    out_features, in_features = shape
    if plan.scheme.name == "W8A8":
        return {
            "weight": (INT8, shape),
            "deq_scale": (FLOAT32, (out_features,)),
            "quant_bias": (INT32, (out_features,)),
            "input_scale": (plan.dtype, (in_features,)),
            "input_offset": (INT8, (in_features,)),
        }
    if plan.scheme.name == "W8A8_DYNAMIC":
        return {
            "weight": (INT8, shape),
            "weight_scale": (weight_scale_dtype(plan.dtype), (out_features,)),
        }
    raise MsQuantError(f"golden-stick cannot hold scheme {plan.scheme.name}")


def linear_tensor(plan: Plan, linear: QuantizedLinear, suffix: str) -> np.ndarray:
    """One tensor of a quantized linear, as stored."""
    if suffix == "weight":
        return linear.weight
    if suffix == "weight_scale":
        return linear.weight_scale.astype(weight_scale_dtype(plan.dtype))
    if suffix == "deq_scale":
        return linear.deq_scale
    if suffix == "quant_bias":
        return linear.quant_bias
    if suffix == "input_scale":
        return linear.static.input_scale.astype(plan.dtype)
    return np.full(linear.weight.shape[1], linear.static.offset, np.int8)


def tensor_plans(plan: Plan) -> list[TensorPlan]:
    """Every tensor of the checkpoint, in model order."""
    quantized, shapes = set(plan.quantized()), plan.config.parameter_shapes()
    plans = []
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if path in quantized and len(shape) == 2:
            for suffix, (dtype, size) in linear_plan(plan, (shape[0], shape[1])).items():
                plans.append(TensorPlan(f"{path}.{suffix}", dtype, size))
        else:
            plans.append(TensorPlan(name, plan.dtype, shape))
    return plans


def description(plan: Plan) -> dict[str, str]:
    """Tensor name to scheme. All tensors of a module carry one value, its bias included."""
    quantized = set(plan.quantized())
    return {
        tensor.name: plan.scheme.name if tensor.name.rpartition(".")[0] in quantized else "FLOAT"
        for tensor in tensor_plans(plan)
    }


def model_config(raw: Mapping[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """config.json for the runtime: no quantization entries, and the dtype of what stays float.

    Older runtimes read only ``torch_dtype``, so it is always there; ``dtype`` where the source
    has it.
    """
    config = {key: value for key, value in raw.items() if key not in QUANTIZATION_KEYS}
    if isinstance(config.get("text_config"), Mapping):
        inner = config["text_config"].items()
        config["text_config"] = {k: v for k, v in inner if k not in QUANTIZATION_KEYS}
    if "dtype" in config:
        config["dtype"] = dtype.name
    config["torch_dtype"] = dtype.name
    return config
