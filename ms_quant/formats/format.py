"""What a checkpoint format is: a record of what its files hold. ``formats`` lists them.

A format is a module with such a record. Everything else that reads, writes and verifies
checkpoints asks the record, so nothing there knows a format or a scheme by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ms_quant.files.atomic import ANY_MODE
from ms_quant.files.reader import Checkpoint
from ms_quant.files.writer import INDEX_NAME, Array, TensorPlan
from ms_quant.formats import kv_cache
from ms_quant.formats.float_types import float_dtype
from ms_quant.models.block_spec import BlockSpec, LinearGroup, LinearSpec, NormSpec
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import GroupId, block_prefix
from ms_quant.models.rotary_rows import RotaryRows
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.storage import Storage

Tensors = dict[str, tuple[np.dtype, tuple[int, ...]]]
"""Suffix to type and shape of a quantized linear's tensors, without its bias."""


class Numbers(Protocol):
    """What holds the numbers of a quantized model: a finished job, or another checkpoint."""

    def linear(self, path: str, with_codes: bool = True) -> QuantizedLinear:
        """A quantized linear with its bias, by its full path; else zeros that take no memory stand
        for its codes."""

    def floats(self, name: str, dtype: np.dtype) -> Array:
        """A float tensor of the model in another type, whole or in pieces along its rows."""

    def cache_scale(self, path: str) -> np.ndarray:
        """float32 (scales,) of what is in int8 with a cache, by the path of what holds them."""


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
        stored: how the checkpoint's tensors hold a linear of a scheme, by its path.
        description: compares a description, as stored and as we would write it, and says what is
            wrong and what is to be noted; the last argument is its file. What it raises cannot be
            read. None: they must be equal.
    """

    types: Mapping[str, frozenset[str]] = field(default_factory=dict)
    extra: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    stored: Callable[[Scheme, Storage, Checkpoint, str], Storage] = (
        lambda scheme, storage, checkpoint, path: storage
    )
    description: (
        Callable[[Mapping[str, Any], Mapping[str, Any], Path], tuple[list[str], list[str]]] | None
    ) = None


Make = Callable[[TensorPlan, Numbers], Array]
"""Makes a tensor."""

Options = Callable[[str, LinearSpec], dict[str, Any]]
"""Options of a linear's scheme, by its path."""

Kinds = tuple[dict[str, str], list[str]]
"""Path of every linear of the decoder to its scheme or ``FLOAT``, and what is wrong."""


@dataclass(frozen=True)
class CheckpointFormat:
    """Attributes:
    name: what commands call it.
    shown: what messages call its description.
    find: the files of a directory that describe a checkpoint of this format; one, if it is one.
    document: the file name of the description.
    linear_plan: the tensors of a quantized linear of a group.
    linear_tensor: one of them by its suffix; where it is not one of ``with_codes`` the linear's
        codes are zeros that take no memory.
    read_linear: the linear at a path, with this bias; what the tensors contradict is refused.
    describe: the description of a checkpoint with these tensors.
    kinds: what a description says that each linear is; the last argument is its file.
    scheme_options: what tells the options of a linear's scheme and, under ``"fold"``, where its
        smoothing is, as far as the description and its tensors say.
    check: refuses a linear of a group and name that cannot be stored.
    with_codes: suffixes that need the linear's codes.
    weights: names of the weight files, how many there are: a prefix of shards with an index, or
        for one file its whole name by the plan.
    index: file name of the shards' index.
    entry: of config.json, where that holds the description; else "".
    bias_name: full name of the bias that a quantized linear, by its path, has in the model.
    bias_dtype: type of the bias of a quantized linear, by its path.
    why_not_run: why the runtime fails on a linear of a group that files can hold, or "".
    mode: the widest permissions of the description and the weights that the runtime reads.
    stored_rows: in which order the rows of a linear of a block are stored, where it is not that of
        the model.
    by_row: suffixes of a linear's tensors that have its rows.
    holds_cache: whether it has tensors for keys and values cached in int8.
    leeway: how checkpoints by others may differ.
    """

    name: str
    shown: str
    find: Callable[[Path], list[Path]]
    document: Callable[[Plan], str]
    linear_plan: Callable[[LayerPlan, LinearGroup, LinearSpec], Tensors]
    linear_tensor: Callable[[LayerPlan, LinearGroup, QuantizedLinear, str], np.ndarray]
    read_linear: Callable[
        [LayerPlan, LinearGroup, LinearSpec, Checkpoint, str, np.ndarray | None], QuantizedLinear
    ]
    describe: Callable[[Plan, Sequence[TensorPlan]], dict[str, Any]]
    kinds: Callable[[ModelConfig, Mapping[str, Any], Path], Kinds]
    scheme_options: Callable[[ModelConfig, Mapping[str, Any], Checkpoint], Options]
    check: Callable[[LayerPlan, LinearGroup, LinearSpec, str], None]
    with_codes: frozenset[str]
    weights: str | Callable[[Plan], str]
    index: str = INDEX_NAME
    entry: str = ""
    bias_name: Callable[[LayerPlan, str], str] = lambda layer, path: f"{path}.bias"
    bias_dtype: Callable[[LayerPlan, str], np.dtype] = lambda layer, path: layer.dtype
    why_not_run: Callable[[LayerPlan, LinearGroup, LinearSpec], str] = lambda *linear: ""
    mode: int = ANY_MODE
    stored_rows: Callable[[ModelConfig, int, LinearSpec], RotaryRows | None] = (
        lambda config, index, spec: None
    )
    by_row: frozenset[str] = frozenset()
    holds_cache: bool = False
    leeway: Leeway = field(default_factory=Leeway)

    @property
    def title(self) -> str:
        """What messages call such a checkpoint."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name} checkpoint"

    def tensor_plans(self, plan: Plan) -> list[TensorPlan]:
        """Every tensor of the checkpoint, in model order."""
        before, after = plan.config.outer_shapes()
        plans = [self._float(plan, *tensor) for tensor in before.items()]
        for block in plan.config.stored_blocks:
            plans += self._block(plan, block)
        plans += [self._float(plan, *tensor) for tensor in after.items()]
        for name, code, shape in plan.config.carried:
            plans.append(TensorPlan(name, DTYPES.get(code, plan.dtype), shape, make=_floats))
        return plans

    def _block(self, plan: Plan, block: BlockSpec) -> Iterator[TensorPlan]:
        prefix, cached = block_prefix(block.index), dict(plan.cached(block.index))
        parts: dict[tuple[str, LinearSpec], Tensors] = {}  # those of gate and up are often one
        for name, shape in block.tensors.items():
            member, _, suffix = name.rpartition(".")
            group, path = block.group_of(member), prefix + member
            layer = plan.layers[GroupId(block.index, group.name)] if group else None
            spec = block.modules[member]
            order = self.row_order(plan.config, block.index, spec)
            if group is None or layer is None:
                dtype = float_dtype(plan, spec, suffix)
                make = self._ordered(order, suffix, _floats)
                yield TensorPlan(prefix + name, dtype, shape, make=make)
            elif suffix == "weight":
                one = group.name, block.linears[member]
                if one not in parts:
                    parts[one] = self.linear_plan(layer, group, one[1])
                part = partial(self._part, layer, group)
                for key, (dtype, shape) in parts[one].items():
                    make = self._ordered(order, key, part)
                    yield TensorPlan(f"{path}.{key}", dtype, shape, (path, key), make=make)
            else:
                yield self._bias(layer, path, shape, self._ordered(order, suffix, _floats))
            if suffix == "weight" and member in cached:
                yield from kv_cache.tensor_plans(path, cached.pop(member))
        for member, kept in cached.items():  # of attention, not of a linear
            yield from kv_cache.tensor_plans(prefix + member, kept)

    def _part(
        self, layer: LayerPlan, group: LinearGroup, tensor: TensorPlan, numbers: Numbers
    ) -> np.ndarray:
        assert tensor.part is not None
        path, key = tensor.part
        linear = numbers.linear(path, key in self.with_codes)
        return self.linear_tensor(layer, group, linear, key)

    def _float(self, plan: Plan, name: str, shape: tuple[int, ...]) -> TensorPlan:
        return TensorPlan(name, plan.dtype, shape, make=_floats)

    def row_order(
        self, config: ModelConfig, index: int, spec: LinearSpec | NormSpec
    ) -> RotaryRows | None:
        """The order of the rows of a block's linear, where it is not that of the model."""
        return self.stored_rows(config, index, spec) if isinstance(spec, LinearSpec) else None

    def _ordered(self, order: RotaryRows | None, suffix: str, make: Make) -> Make:
        """What makes a tensor, its rows in the order that they are stored in."""
        return make if order is None or suffix not in self.by_row else partial(_stored, order, make)

    def _bias(self, layer: LayerPlan, path: str, shape: tuple[int, ...], make: Make) -> TensorPlan:
        """The bias that the model itself has."""
        name, dtype = self.bias_name(layer, path), self.bias_dtype(layer, path)
        return TensorPlan(name, dtype, shape, (path, "bias"), f"{path}.bias", make)

    def description(self, plan: Plan) -> dict[str, Any]:
        """The description itself."""
        return self.describe(plan, self.tensor_plans(plan))


def _floats(tensor: TensorPlan, numbers: Numbers) -> Array:
    return numbers.floats(tensor.source or tensor.name, tensor.dtype)


def _stored(order: RotaryRows, make: Make, tensor: TensorPlan, numbers: Numbers) -> np.ndarray:
    found = make(tensor, numbers)
    whole = found if isinstance(found, np.ndarray) else np.concatenate(list(found))
    return whole[order.halves(len(whole))]


def is_there(name: str) -> Callable[[Path], list[Path]]:
    """Finds a description by its one name."""
    return lambda directory: [path for path in [directory / name] if path.exists()]
