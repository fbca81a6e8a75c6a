"""What becomes of each tensor of a transformer: decided once, before any work."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np

from ms_quant.algorithms.problem import Problem, Solution, input_quantization
from ms_quant.diffusers.component import Component
from ms_quant.diffusers.methods import ASCEND, Storage
from ms_quant.errors import BadArgumentError, MsQuantError, UnsupportedError
from ms_quant.files.floats import round_chunks
from ms_quant.files.reader import Checkpoint
from ms_quant.files.writer import Array, TensorPlan
from ms_quant.formats.ascend.format import VERSION
from ms_quant.models.block_spec import LinearGroup
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.quantization.streamed import rounded_by_rows

FLOAT, EXCLUDED = "FLOAT", "excluded"
_INDEX = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Choice:
    """What is asked of the linears.

    Attributes:
        exclude: glob patterns of those that stay float, by whole fused groups.
        float_undivided: leave those float that the method cannot compute, instead of refusing.
        dtype: type of what stays float; None is as it is stored.
    """

    exclude: Sequence[str] = ()
    float_undivided: bool = False
    dtype: np.dtype | None = None


@dataclass(frozen=True)
class ComponentPlan:
    """What a transformer becomes.

    Attributes:
        component: the transformer; float where it is to be quantized.
        storage: how its linears are held.
        quantized: the groups of linears that are quantized.
        floats: path of a linear of a block that stays float to the reason.
        dtype: type of what stays float; None is as it is stored.
    """

    component: Component
    storage: Storage
    quantized: tuple[LinearGroup, ...]
    floats: Mapping[str, str]
    dtype: np.dtype | None = None

    @cached_property
    def linears(self) -> dict[str, LinearGroup]:
        """Path of each quantized linear to its group."""
        return {path: group for group in self.quantized for path in group.linears}

    @cached_property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """Every tensor, in the order of the names of the float model."""
        return tuple(self._tensors())

    def _tensors(self) -> Iterator[TensorPlan]:
        checkpoint = self.component.checkpoint
        for name in checkpoint.names:
            path, _, suffix = name.rpartition(".")
            if suffix == "weight" and path in self.linears:
                for part, made in self.storage.parts(self.linears[path], path).items():
                    yield TensorPlan(f"{path}.{part}", made.dtype, made.shape, (path, part))
            elif not (path in self.linears and suffix in PARTS):
                info = checkpoint.info(name)
                yield TensorPlan(name, self.dtype or info.dtype, info.shape)

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    @cached_property
    def ignored(self) -> list[str]:
        """The float linears, by diffusers' names and by those that vllm-omni asks for."""
        family = self.component.family
        paths = self.component.float_linears(self.linears)
        left = [g for g in self.component.all_groups if not self.linears.keys() & set(g.linears)]
        return sorted({*paths, *map(family.runtime_name, paths), *(g.fused for g in left)})

    def entry(self) -> dict[str, Any]:
        """The ``quantization_config`` of ``config.json``."""
        method = self.storage.method
        if method.name == ASCEND:
            return {"quant_method": ASCEND}
        return {
            "quant_method": method.name,
            method.flag: True,
            "ignored_layers": self.ignored,
        }

    def description(self) -> dict[str, Any]:
        """The ``quant_model_description.json`` of method ascend.

        Linears are named as diffusers and as vllm-omni calls them: its lookups are by its own.
        """
        scheme, family = self.storage.layer.scheme, self.component.family
        result = {t.name: scheme.name if _of_codes(t) else FLOAT for t in self.tensors}
        for group in self.quantized:
            others = {family.runtime_name(path) for path in group.linears} | {group.fused}
            result |= {f"{path}.weight": scheme.name for path in others}
        result |= {f"{path}.weight": FLOAT for path in self.ignored}
        return {
            **dict(sorted(result.items())),
            "version": VERSION,
            "model_quant_type": scheme.name,
            "group_size": scheme.weight.group_size,
            "metadata": {},
            "optional": {},
        }

    def condensed(self) -> dict[str, str]:
        """Linears that stay float, those of all blocks as one, with how many and why."""
        counted = Counter((_INDEX.sub(".*.", p, count=1), why) for p, why in self.floats.items())
        return {path: f"{count}, {why}" for (path, why), count in counted.items()}


PARTS = ("weight", "weight_scale", "weight_offset", "weight_dual_scale", "mul_scale")
"""Suffixes of what a quantized linear has in place of its weight."""


def _of_codes(tensor: TensorPlan) -> bool:
    return tensor.part is not None


def plan_component(component: Component, storage: Storage, choice: Choice) -> ComponentPlan:
    """Decides what becomes of a transformer.

    Raises:
        MsQuantError: a linear cannot be quantized so, a pattern matches none, or none is left.
    """
    floats, quantized = dict(component.kept), []
    for group in component.groups:
        matched = [p for p in group.linears for x in choice.exclude if fnmatchcase(p, x)]
        why = EXCLUDED if matched else _why_undivided(group, storage, choice.float_undivided)
        if why:
            floats |= dict.fromkeys(group.linears, why)
        else:
            quantized.append(group)
    if not quantized:
        raise UnsupportedError(
            f"{component.directory}: no linear is left to quantize of {len(floats)}, expected some"
        )
    return ComponentPlan(component, storage, tuple(quantized), floats, choice.dtype)


def check_patterns(patterns: Sequence[str], components: Sequence[Component]) -> None:
    """Refuses patterns that match no linear of a block.

    Raises:
        MsQuantError: names the pattern.
    """
    paths = [path for component in components for path in component.shapes]
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise BadArgumentError(
                f"pattern {pattern!r} matches no linear of a block, expected something like "
                f"{paths[0]!r} or '*.{paths[-1].partition('.')[2].partition('.')[2]}'"
            )


def _why_undivided(group: LinearGroup, storage: Storage, float_undivided: bool) -> str:
    """Why a group cannot be quantized, if that leaves it float."""
    try:
        for path, spec in group.linears.items():
            storage.check(path, spec.in_features)
    except MsQuantError:
        if not float_undivided:
            raise
        columns, multiple = group.in_features, storage.method.multiple
        return f"{columns} inputs are no multiple of {multiple}" if multiple > 1 else "undivided"
    return ""


class Values:
    """The tensors of a quantized transformer, made when they are asked for.

    Args:
        plan: what to make.
    """

    def __init__(self, plan: ComponentPlan):
        self.plan, self.checkpoint = plan, plan.component.checkpoint
        self._last: tuple[str, QuantizedLinear] | None = None

    def __call__(self, tensor: TensorPlan) -> Array:
        if tensor.part is None:
            return round_chunks(self.checkpoint, tensor.name, tensor.dtype)
        path, suffix = tensor.part
        part = self.plan.storage.parts(self.plan.linears[path], path)[suffix]
        return part.make(self.linear(path))

    def linear(self, path: str) -> QuantizedLinear:
        """A quantized linear; the last one stays in memory."""
        if self._last is None or self._last[0] != path:
            self._last = None
            self._last = path, quantized_linear(self.checkpoint, self.plan.storage, path)
        return self._last[1]


def quantized_linear(checkpoint: Checkpoint, storage: Storage, path: str) -> QuantizedLinear:
    """A linear, rounded to nearest from its weight alone.

    Raises:
        MsQuantError: the weight holds NaN or infinity.
    """
    layer, name = storage.layer, f"{path}.weight"
    scales = layer.storage.scale_dtype
    codes, grid = rounded_by_rows(checkpoint, name, storage.weight, scales, name)
    problem = Problem(path, layer.scheme, {}, {}, None, layer.dtype, _no_error)
    return QuantizedLinear(codes, grid, activation=input_quantization(problem, Solution()))


def _no_error(candidate: object) -> float:
    raise AssertionError("an error of a weight that is rounded to nearest")
