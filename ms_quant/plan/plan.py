"""What will be done to which linear of a model, decided and checked before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ms_quant.budget import SEARCH_TOKENS
from ms_quant.models.block_spec import CacheSpec, LinearGroup
from ms_quant.models.config import ModelConfig
from ms_quant.models.edge import Edge
from ms_quant.models.names import GroupId, LinearId, block_prefix, in_block
from ms_quant.plan.layer import LayerPlan
from ms_quant.schemes.support import store
from ms_quant.schemes.table import get_scheme


@dataclass(frozen=True)
class Plan:
    """What becomes of every group of linears of a model.

    Attributes:
        config: the model.
        format: the name of the checkpoint format.
        layers: every group, in model order, to what becomes of it; None stays float.
        dtype: type of what stays float in the output.
        search_tokens: searches look at this many of the calibration tokens, at most.
        kv_cache: how keys and values are cached, one of ``KV_CACHES``, or "".
        float_caches: blocks whose cache stays float all the same.
        foreign: whether others made the checkpoint: how it was made is not known, and what follows
            from other tensors may be rounded otherwise.
        router_dtype: type of the weights of routers in the output; None is ``dtype``.
    """

    config: ModelConfig
    format: str
    layers: Mapping[GroupId, LayerPlan | None]
    dtype: np.dtype
    search_tokens: int = SEARCH_TOKENS
    kv_cache: str = ""
    foreign: bool = False
    router_dtype: np.dtype | None = None
    float_caches: frozenset[int] = frozenset()

    def cached(self, index: int) -> Mapping[str, CacheSpec]:
        """What of a block is in int8 with a cache, by path."""
        if not self.kv_cache or index in self.float_caches:
            return {}
        return self.config.block(index).cached

    def layer(self, index: int, group: LinearGroup) -> LayerPlan:
        """What becomes of a quantized group of a block."""
        found = self.layers[GroupId(index, group.name)]
        assert found is not None, (index, group.name)
        return found

    def layer_of(self, path: str | LinearId) -> LayerPlan | None:
        """What becomes of a linear, by its full path; None for what stays float."""
        found = in_block(str(path))
        group = self.config.block(found[0]).group_of(found[1]) if found else None
        return self.layers[GroupId(found[0], group.name)] if found and group else None

    def quantized_layer(self, path: str | LinearId) -> LayerPlan:
        """What becomes of a linear that does not stay float."""
        found = self.layer_of(path)
        assert found is not None, path
        return found

    @cached_property
    def distinct(self) -> list[LayerPlan]:
        """Every layer plan that there is once, the first group's first."""
        seen = {id(layer): layer for layer in self.layers.values() if layer is not None}
        found: list[LayerPlan] = []
        for layer in seen.values():
            if layer not in found:
                found.append(layer)
        return found

    @property
    def scheme_name(self) -> str:
        """The names of the schemes, joined."""
        return "+".join(dict.fromkeys(layer.scheme.name for layer in self.distinct))

    @property
    def algorithm(self) -> str:
        """The names of the algorithms, joined; those of different layers side by side."""
        return ", ".join(dict.fromkeys(layer.algorithms.name for layer in self.distinct))

    def any(self, attribute: str) -> bool:
        """Whether some algorithm of some group has a flag of :class:`Algorithm`."""
        return any(layer.algorithms.any(attribute) for layer in self.distinct)

    @property
    def needs_calibration(self) -> bool:
        static = any(layer.needs_calibration for layer in self.distinct)
        return static or bool(self.kv_cache)

    @property
    def phased(self) -> bool:
        """Whether some linears tell prefill and decode apart."""
        return any(layer.phased for layer in self.distinct)

    def same_numbers(self, other: Plan) -> bool:
        """Whether another format's plan gets the same numbers in every group."""
        caches = (self.kv_cache, self.float_caches), (other.kv_cache, other.float_caches)
        if caches[0] != caches[1] or self.layers.keys() != other.layers.keys():
            return False
        compared: dict[tuple[int, int], bool] = {}
        for group, one in self.layers.items():
            two = other.layers[group]
            key = id(one), id(two)
            if key not in compared:
                compared[key] = _numbers(one) == _numbers(two)
            if not compared[key]:
                return False
        return True

    def record(self) -> dict[str, Any]:
        """What decides the numbers, besides the data and the model, as JSON."""
        first = self.distinct[0]
        layers = {id(layer): layer for layer in self.layers.values() if layer is not None}
        records = {key: layer.record() for key, layer in layers.items()}
        usual = next(iter(records.values()))
        mixed = {
            str(group): records[id(layer)]
            for group, layer in self.layers.items()
            if layer is not None and records[id(layer)] != usual
        }
        scheme = first.scheme
        _, default = store(get_scheme(scheme.name, **scheme.chosen), self.dtype)
        return {
            **usual,
            **({"mixed": dict(sorted(mixed.items()))} if mixed else {}),
            **({"kv_cache": self.kv_cache} if self.kv_cache else {}),
            **({"float_caches": sorted(self.float_caches)} if self.float_caches else {}),
            **({"format": self.format} if self.format != default.format else {}),
            "dtype": self.dtype.name,
        }

    def groups(self, index: int) -> list[LinearGroup]:
        """The groups of a block that are quantized."""
        groups = self.config.block(index).groups
        return [g for g in groups if self.layers[GroupId(index, g.name)] is not None]

    def producer(self, index: int, group: LinearGroup) -> Edge | None:
        """Where the smoothing of a group's input may be folded: see :meth:`holds_smoothing`."""
        edge = self.config.block(index).producer_of(group)
        return edge if edge is not None and self.holds_smoothing(index, edge) else None

    def holds_smoothing(self, index: int, edge: Edge) -> bool:
        """Whether what makes an input can be divided by a smoothing vector.

        A norm can, unless experts that stay float read it: all of them would change. A linear that
        is never quantized can, and one that is; one that was excluded stays as it was.
        """
        key = index, edge.producer
        if key not in self._holding:
            self._holding[key] = self._can_be_divided(index, edge)
        return self._holding[key]

    @cached_property
    def _holding(self) -> dict[tuple[int, str], bool]:
        return {}

    def _can_be_divided(self, index: int, edge: Edge) -> bool:
        block = self.config.block(index)
        if edge.norm:
            routed = (name for name in edge.consumers if block.group(name).routed)
            return all(self.layers[GroupId(index, name)] is not None for name in routed)
        group = block.group_of(edge.producer)
        return group is None or self.layers[GroupId(index, group.name)] is not None

    def quantized(self) -> list[str]:
        """Full paths of the quantized linears, in model order."""
        return [
            f"{block_prefix(index)}{member}"
            for index in range(self.config.num_blocks)
            for group in self.groups(index)
            for member in group.members
        ]

    def float_linears(self) -> list[str]:
        """Full paths of the decoder linears that stay float."""
        done = set(self.quantized())
        return [
            path
            for block in self.config.stored_blocks
            for member in block.linears
            if (path := f"{block_prefix(block.index)}{member}") not in done
        ]


def _numbers(layer: LayerPlan | None) -> tuple[Any, ...]:
    return () if layer is None else layer.numbers


def all_groups(config: ModelConfig) -> Iterable[tuple[GroupId, LinearGroup]]:
    """Every group of a model, in model order."""
    for block in config.stored_blocks:
        for group in block.groups:
            yield GroupId(block.index, group.name), group
