"""The parameters of a QuantLinear: what they are, and where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, ops

from ms_quant.errors import BadArgumentError
from ms_quant.kernels import WatchedArrays
from ms_quant.numerics.activation import Activation, PerToken, PhasedActivation, StaticActivation
from ms_quant.numerics.linear import QuantizedLinear, folded_bias
from ms_quant.numerics.timestep import TimestepActivation
from ms_quant.numerics.timestep_linear import timestep_tables


def tensors_of(linear: QuantizedLinear) -> dict[str, np.ndarray]:
    """All that decides what a linear computes, by the names of the parameters."""
    tensors = {"weight": linear.weight}
    activation = linear.activation
    if isinstance(activation, StaticActivation | PhasedActivation):
        static = linear.static
        tensors["input_scale"] = static.input_scale
        tensors["input_offset"] = np.full(linear.weight.shape[1], static.offset, np.int8)
        tensors["deq_scale"] = linear.deq_scale
        folds = static.folds_bias
        tensors["quant_bias"] = folded_bias(linear, "linear") if folds else linear.quant_bias
    if isinstance(activation, TimestepActivation):
        tensors |= activation.arrays()
        tensors["deq_scale"], tensors["quant_bias"] = timestep_tables(linear, "linear")
    if not isinstance(activation, StaticActivation):
        for name, array in linear.grid.arrays().items():
            tensors[name] = array[:, 0] if linear.integer else array
    clip = _clip(activation)
    if clip != 1 or linear.kronecker is not None:
        tensors["clip_ratio"] = np.array([clip], np.float32)
    if linear.mul_scale is not None:
        tensors["mul_scale"] = linear.mul_scale
    if linear.kronecker is not None:
        tensors["left_trans"] = linear.kronecker.left
        tensors["right_trans"] = linear.kronecker.right
    if linear.branch is not None:
        tensors["svd_lowrank_l1"] = linear.branch.l1
        tensors["svd_lowrank_l2"] = linear.branch.l2
    if linear.bias is not None:
        tensors["bias"] = linear.bias
    return tensors


def _clip(activation: Activation) -> float:
    return activation.clip if isinstance(activation, PerToken) else 1.0


def make_parameters(
    tensors: Mapping[str, np.ndarray], on_host: bool
) -> tuple[dict[str, Parameter], WatchedArrays | None]:
    """Parameters with these values; on the host on watched memory, which they never leave."""
    if not on_host:
        return {
            name: Parameter(Tensor(a), requires_grad=False) for name, a in tensors.items()
        }, None
    watched = WatchedArrays(tensors)
    return {name: _on(array) for name, array in watched.arrays.items()}, watched


def _on(array: np.ndarray) -> Parameter:
    parameter = Parameter(Tensor(array), requires_grad=False)
    parameter.assign_value(Tensor.from_numpy(array))
    base: Any = type(parameter)
    parameter.__class__ = _fixed(base)
    return parameter


@cache
def _fixed(base: Any) -> type:
    return type("Parameter", (_InPlace, base), {})


class _InPlace:
    """What a Parameter does otherwise to stay in its memory.

    MindSpore's ``set_data``, and with it ``load_param_into_net``, gives a parameter other memory,
    which a function under ``jit`` does not see: it goes on with the old one. Here values are
    copied, as ``ops.assign`` does it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: object

    def assign_value(self, data: Tensor) -> _InPlace:
        if tuple(data.shape) != tuple(self.shape) or data.dtype != self.dtype:
            raise BadArgumentError(
                f"{self.name}: set to {data.dtype} {list(data.shape)}, expected {self.dtype} "
                f"{list(self.shape)} as a quantized linear keeps its types and shapes"
            )
        ops.assign(self, data)
        return self

    assign_value_cpp = _update_data = assign_value

    def set_dtype(self, dtype: object) -> None:
        raise BadArgumentError(
            f"{self.name}: set_dtype({dtype}), expected {self.dtype} as a quantized linear keeps "
            "its types"
        )


def refuse_replacing(kept: Mapping[str, Parameter], name: str, value: object) -> None:
    """Refuses another object in the place of a parameter, which nothing would look at.

    Raises:
        MsQuantError: it is one.
    """
    if name in kept and value is not kept[name] and not _is_values(value):
        raise BadArgumentError(
            f"{kept[name].name}: replaced by {type(value).__name__}, expected new values by "
            "set_data or load_param_into_net as a quantized linear keeps its parameters"
        )


def _is_values(value: object) -> bool:
    """MindSpore gives a Tensor to the parameter that is there."""
    return isinstance(value, Tensor) and not isinstance(value, Parameter)
