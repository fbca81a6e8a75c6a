"""What a checkpoint flavour is: a record of what its files hold. ``flavours`` lists them.

A flavour is a module with such a record. Everything else that reads, writes and verifies
checkpoints asks the record, so nothing there knows a flavour or a scheme by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ms_quant.checkpoint import kv_cache
from ms_quant.checkpoint.writer import TensorPlan
from ms_quant.models.config import ModelConfig
from ms_quant.models.families import LinearGroup
from ms_quant.numerics.linear import QuantizedLinear

if TYPE_CHECKING:
    from ms_quant.checkpoint.reader import Checkpoint
    from ms_quant.plan import Plan

Tensors = dict[str, tuple[np.dtype, tuple[int, ...]]]
"""Suffix to type and shape of a quantized linear's tensors, without its bias."""


@dataclass(frozen=True)
class Flavour:
    """Attributes:
    name: what commands call it.
    document: the description's file name, by which a directory is recognised.
    shard_prefix: of the names of the weight files.
    index: file name of their index.
    linear_plan: the tensors of a quantized linear of a group and shape (out, in).
    linear_tensor: one of them by its suffix; where it is not one of ``with_codes`` the linear's
        codes are zeros that take no memory.
    read_linear: the linear at a path, with this bias; what the tensors contradict is refused.
    describe: the description of a checkpoint with these tensors.
    scheme_options: options of a linear's scheme, by its path, as far as its tensors tell.
    check: refuses a linear of a group, shape and name that cannot be stored.
    with_codes: suffixes that need the linear's codes.
    floats: suffixes that the description calls FLOAT although the linear is quantized.
    bias_dtype: type of a quantized linear's bias; None is the model's.
    holds_cache: whether it has tensors for keys and values cached in int8.
    """

    name: str
    document: str
    shard_prefix: str
    index: str
    linear_plan: Callable[[Plan, LinearGroup, tuple[int, int]], Tensors]
    linear_tensor: Callable[[Plan, LinearGroup, QuantizedLinear, str], np.ndarray]
    read_linear: Callable[[Plan, LinearGroup, Checkpoint, str, np.ndarray | None], QuantizedLinear]
    describe: Callable[[Plan, Sequence[TensorPlan]], dict[str, Any]]
    scheme_options: Callable[[ModelConfig, Mapping[str, Any], Checkpoint, str], dict[str, Any]]
    check: Callable[[Plan, LinearGroup, tuple[int, int], str], None]
    with_codes: frozenset[str]
    floats: frozenset[str] = frozenset()
    bias_dtype: np.dtype | None = None
    holds_cache: bool = False

    @property
    def title(self) -> str:
        """What messages call such a checkpoint."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name} checkpoint"

    def tensor_plans(self, plan: Plan) -> list[TensorPlan]:
        """Every tensor of the checkpoint, in model order."""
        quantized, shapes = set(plan.quantized()), plan.config.parameter_shapes()
        plans = []
        for name, shape in shapes.items():
            path, _, suffix = name.rpartition(".")
            if path in quantized and suffix == "weight":
                own, group = plan.at(path), group_of(plan, path)
                parts = self.linear_plan(own, group, (shape[0], shape[1]))
                plans += [TensorPlan(f"{path}.{key}", *part) for key, part in parts.items()]
            elif path in quantized:
                plans.append(TensorPlan(name, self.bias_dtype or plan.dtype, shape))
            else:
                plans.append(TensorPlan(name, plan.dtype, shape))
            if plan.kv_cache and suffix == "weight" and kv_cache.is_cached(path):
                plans += kv_cache.tensor_plans(path, shape[0])
        return plans

    def description(self, plan: Plan) -> dict[str, Any]:
        """The content of ``document``."""
        return self.describe(plan, self.tensor_plans(plan))


def group_of(plan: Plan, path: str) -> LinearGroup:
    """The group of a linear by its full path."""
    member = path.split(".", 3)[3]
    return next(group for group in plan.config.family.groups if member in group.members)


def in_channels(plan: Plan, path: str) -> int:
    """The number of inputs of a linear by its full path."""
    return plan.config.linear_shapes()[path.split(".", 3)[3]][1]
