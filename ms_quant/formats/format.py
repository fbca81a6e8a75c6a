"""What a checkpoint format is: a record of what its files hold. ``formats`` lists them.

A format is a module with such a record. Everything else that reads, writes and verifies
checkpoints asks the record, so nothing there knows a format or a scheme by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ms_quant.files.atomic import ANY_MODE
from ms_quant.files.writer import INDEX_NAME, TensorPlan
from ms_quant.formats import kv_cache
from ms_quant.models.config import ModelConfig
from ms_quant.models.families import LinearGroup
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.schemes.records import Scheme

if TYPE_CHECKING:
    from ms_quant.files.reader import Checkpoint
    from ms_quant.plan.plan import Plan

Tensors = dict[str, tuple[np.dtype, tuple[int, ...]]]
"""Suffix to type and shape of a quantized linear's tensors, without its bias."""


@dataclass(frozen=True)
class Part:
    """One tensor.

    Attributes:
        dtype: as stored.
        shape: as stored.
        make: its value, from the linear with its bias.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[QuantizedLinear], np.ndarray]


@dataclass(frozen=True)
class Leeway:
    """Where checkpoints that others made may differ from ours, and stand for the same numbers.

    Attributes:
        types: suffix of a quantized linear's tensor to further types, by name, that it may have.
        extra: suffixes of tensors that no runtime needs; what they say is compared with the rest.
        aliases: other names of schemes.
        stored: the scheme of a linear, by its path, as the checkpoint's tensors hold it.
        description: compares a description, as stored and as we would write it, and says what is
            wrong and what is to be noted; the last argument is its file. What it raises cannot be
            read. None: they must be equal.
    """

    types: Mapping[str, frozenset[str]] = field(default_factory=dict)
    extra: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    stored: Callable[[Scheme, Checkpoint, str], Scheme] = lambda scheme, checkpoint, path: scheme
    description: (
        Callable[[Mapping[str, Any], Mapping[str, Any], Path], tuple[list[str], list[str]]] | None
    ) = None


Kinds = tuple[dict[str, str], list[str]]
"""Path of every linear of the decoder to its scheme or ``FLOAT``, and what is wrong."""


@dataclass(frozen=True)
class CheckpointFormat:
    """Attributes:
    name: what commands call it.
    shown: what messages call its description.
    find: the files of a directory that describe a checkpoint of this format; one, if it is one.
    document: the file name of the description.
    linear_plan: the tensors of a quantized linear of a group and shape (out, in).
    linear_tensor: one of them by its suffix; where it is not one of ``with_codes`` the linear's
        codes are zeros that take no memory.
    read_linear: the linear at a path, with this bias; what the tensors contradict is refused.
    describe: the description of a checkpoint with these tensors.
    kinds: what a description says that each linear is; the last argument is its file.
    scheme_options: options of a linear's scheme, by its path, and under ``"fold"`` where its
        smoothing is, as far as the description and its tensors tell.
    check: refuses a linear of a group, shape and name that cannot be stored.
    with_codes: suffixes that need the linear's codes.
    weights: names of the weight files, how many there are: a prefix of shards with an index, or
        for one file its whole name by the plan.
    index: file name of the shards' index.
    entry: of config.json, where that holds the description; else "".
    bias_name: full name of the bias that a quantized linear, by its path, has in the model.
    bias_dtype: type of the bias of a quantized linear, by its path.
    why_not_run: why the runtime fails on a linear of a group and shape that files can hold, or "".
    mode: the widest permissions of the description and the weights that the runtime reads.
    holds_cache: whether it has tensors for keys and values cached in int8.
    leeway: how checkpoints by others may differ.
    """

    name: str
    shown: str
    find: Callable[[Path], list[Path]]
    document: Callable[[Plan], str]
    linear_plan: Callable[[Plan, LinearGroup, tuple[int, int]], Tensors]
    linear_tensor: Callable[[Plan, LinearGroup, QuantizedLinear, str], np.ndarray]
    read_linear: Callable[[Plan, LinearGroup, Checkpoint, str, np.ndarray | None], QuantizedLinear]
    describe: Callable[[Plan, Sequence[TensorPlan]], dict[str, Any]]
    kinds: Callable[[ModelConfig, Mapping[str, Any], Path], Kinds]
    scheme_options: Callable[[ModelConfig, Mapping[str, Any], Checkpoint, str], dict[str, Any]]
    check: Callable[[Plan, LinearGroup, tuple[int, int], str], None]
    with_codes: frozenset[str]
    weights: str | Callable[[Plan], str]
    index: str = INDEX_NAME
    entry: str = ""
    bias_name: Callable[[Plan, str], str] = lambda plan, path: f"{path}.bias"
    bias_dtype: Callable[[Plan, str], np.dtype] = lambda plan, path: plan.dtype
    why_not_run: Callable[[Plan, LinearGroup, tuple[int, int]], str] = lambda *linear: ""
    mode: int = ANY_MODE
    holds_cache: bool = False
    leeway: Leeway = field(default_factory=Leeway)

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
                for key, part in parts.items():
                    plans.append(TensorPlan(f"{path}.{key}", *part, part=(path, key)))
            elif path in quantized:
                plans.append(self._bias(plan, path, shape))
            else:
                plans.append(TensorPlan(name, plan.dtype, shape))
            if plan.kv_cache and suffix == "weight" and kv_cache.is_cached(path):
                plans += kv_cache.tensor_plans(path, shape[0])
        return plans

    def _bias(self, plan: Plan, path: str, shape: tuple[int, ...]) -> TensorPlan:
        """The bias that the model itself has."""
        name, dtype = self.bias_name(plan, path), self.bias_dtype(plan, path)
        return TensorPlan(name, dtype, shape, (path, "bias"), f"{path}.bias")

    def description(self, plan: Plan) -> dict[str, Any]:
        """The description itself."""
        return self.describe(plan, self.tensor_plans(plan))


def group_of(plan: Plan, path: str) -> LinearGroup:
    """The group of a linear by its full path."""
    member = path.split(".", 3)[3]
    return next(group for group in plan.config.family.groups if member in group.members)


def in_channels(plan: Plan, path: str) -> int:
    """The number of inputs of a linear by its full path."""
    return plan.config.linear_shapes()[path.split(".", 3)[3]][1]


def is_there(name: str) -> Callable[[Path], list[Path]]:
    """Finds a description by its one name."""
    return lambda directory: [path for path in [directory / name] if path.exists()]
