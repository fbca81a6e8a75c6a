"""What will be done to which linear of a model, decided and checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ms_quant.algorithms import AlgorithmPipeline
from ms_quant.budget import SEARCH_TOKENS
from ms_quant.errors import MsQuantError
from ms_quant.formats.format import CheckpointFormat
from ms_quant.formats.registry import FORMATS
from ms_quant.models.config import ModelConfig, block_prefix
from ms_quant.models.families import LinearGroup
from ms_quant.numerics.activation import Phased
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.table import (
    STATIC_CACHE,
    get_scheme,
)


@dataclass(frozen=True)
class Choices:
    """Attributes:
    scheme: options of the scheme's weights, such as ``group_size``.
    algorithm: options of the algorithms, such as ``alpha`` or ``gptq.damping``.
    float_undivided: leave linears float whose inputs groups do not divide, instead of refusing.
    kv_cache: how keys and values are cached: one of ``KV_CACHES``, or "" for as they are.
    format: the checkpoint format; "" is the one that the scheme has by default.
    fold: where smoothing vectors go, by a name of :class:`Fold`; "" is the format's first choice.
    """

    scheme: Mapping[str, Any] = field(default_factory=dict)
    algorithm: Mapping[str, Any] = field(default_factory=dict)
    float_undivided: bool = False
    kv_cache: str = ""
    format: str = ""
    fold: str = ""


Way = tuple[Scheme, AlgorithmPipeline]
"""What the linears of a group become, and the algorithms that get them there."""


@dataclass(frozen=True)
class Plan:
    """Attributes:
    config: the model.
    scheme: what its linears become; of several schemes that of the first quantized group.
    algorithms: the algorithms, likewise.
    dtype: type of what stays float in the output.
    float_groups: full path prefixes of the groups that stay float, such as
        ``"model.layers.0.down"``.
    search_tokens: searches look at this many of the calibration tokens, at most.
    kv_cache: how keys and values are cached, one of ``KV_CACHES``, or "".
    mixed: full path prefixes of the groups that become something else.
    foreign: whether others made the checkpoint: how it was made is not known, and what follows
        from other tensors may be rounded otherwise.
    """

    config: ModelConfig
    scheme: Scheme
    algorithms: AlgorithmPipeline
    dtype: np.dtype
    float_groups: frozenset[str] = frozenset()
    search_tokens: int = SEARCH_TOKENS
    kv_cache: str = ""
    mixed: Mapping[str, Way] = field(default_factory=dict)
    foreign: bool = False

    def at(self, path: str) -> Plan:
        """The plan of one group alone, by its full path prefix or that of one of its linears."""
        if not self.mixed:
            return self
        scheme, algorithms = self.mixed.get(self._group_path(path), (self.scheme, self.algorithms))
        return replace(self, scheme=scheme, algorithms=algorithms, mixed={})

    def of(self, index: int, group: LinearGroup) -> Plan:
        """The plan of one group of a block alone."""
        return self.at(f"{block_prefix(index)}{group.name}")

    def scheme_of(self, path: str) -> Scheme:
        """What a linear, by its full path, becomes."""
        return self.at(path).scheme

    def _group_path(self, path: str) -> str:
        index, _, member = path.removeprefix("model.layers.").partition(".")
        for group in self.config.family.groups:
            if member in group.members:
                return f"{block_prefix(int(index))}{group.name}"
        return path

    @property
    def ways(self) -> list[Plan]:
        """A plan of one group for each scheme and chain that there is, the first group's first."""
        plans = [replace(self, mixed={})]
        for path in self.mixed:
            if all(self.mixed[path] != (plan.scheme, plan.algorithms) for plan in plans):
                plans.append(self.at(path))
        return plans

    @property
    def scheme_name(self) -> str:
        """The names of the schemes, joined."""
        return "+".join(dict.fromkeys(way.scheme.name for way in self.ways))

    @property
    def algorithm(self) -> str:
        """The names of the algorithms, joined; those of different ways side by side."""
        return ", ".join(dict.fromkeys(way.algorithms.name for way in self.ways))

    @property
    def served_by(self) -> list[str]:
        """The runtimes that serve every scheme there is."""
        if self.fails:
            return []
        first, *others = (way.scheme.served_by for way in self.ways)
        return [runtime for runtime in first if all(runtime in other for other in others)]

    @property
    def not_served_by(self) -> list[str]:
        """Runtimes that do not serve some scheme there is, with the reason."""
        reasons = [reason for way in self.ways for reason in way.scheme.not_served_by]
        return list(dict.fromkeys([*reasons, *filter(None, [self.fails])]))

    @property
    def fails(self) -> str:
        """The first linear that the format's runtime fails on, with the reason; "" for none."""
        for index in range(self.config.num_layers):
            for group in self.groups(index):
                if reason := why_not_run(self, index, group):
                    return reason
        return ""

    @property
    def format(self) -> CheckpointFormat:
        """What the output's files hold."""
        return FORMATS[self.scheme.format]

    def any(self, attribute: str) -> bool:
        """Whether some algorithm of some group has a flag of :class:`Algorithm`."""
        return any(way.algorithms.any(attribute) for way in self.ways)

    @property
    def needs_calibration(self) -> bool:
        static = any(way.scheme.needs_calibration for way in self.ways)
        return static or self.any("calibrated") or self.kv_cache == STATIC_CACHE

    @property
    def phased(self) -> bool:
        """Whether some linears tell prefill and decode apart."""
        return any(isinstance(way.scheme.activation, Phased) for way in self.ways)

    def record(self) -> dict[str, Any]:
        """What decides the numbers, besides the data and the model, as JSON."""
        mixed = {path: _way_record(*way, self.dtype) for path, way in sorted(self.mixed.items())}
        return {
            **_way_record(self.scheme, self.algorithms, self.dtype),
            **({"mixed": mixed} if mixed else {}),
            **({"kv_cache": self.kv_cache} if self.kv_cache else {}),
            **self._place(),
            "dtype": self.dtype.name,
        }

    def _place(self) -> dict[str, str]:
        """The format, where it is not the scheme's default."""
        scheme = self.scheme
        usual = get_scheme(scheme.name, **scheme.chosen).format
        return {} if scheme.format == usual else {"format": scheme.format}

    def groups(self, index: int) -> list[LinearGroup]:
        """The groups of a block that are quantized."""
        prefix = block_prefix(index)
        groups = self.config.family.groups
        return [group for group in groups if f"{prefix}{group.name}" not in self.float_groups]

    def feed(self, index: int, group: LinearGroup) -> str | None:
        """Where the smoothing of a group's input may be folded: a norm, or a quantized linear."""
        quantized = {member for other in self.groups(index) for member in other.members}
        return group.feed if group.feeds_from_norm or group.feed in quantized else None

    def quantized(self) -> list[str]:
        """Full paths of the quantized linears, in model order."""
        return [
            f"{block_prefix(index)}{member}"
            for index in range(self.config.num_layers)
            for group in self.groups(index)
            for member in group.members
        ]

    def float_linears(self) -> list[str]:
        """Full paths of the decoder linears that stay float."""
        done = set(self.quantized())
        return [
            path
            for index in range(self.config.num_layers)
            for member in self.config.linear_shapes()
            if (path := f"{block_prefix(index)}{member}") not in done
        ]


def _way_record(scheme: Scheme, algorithms: AlgorithmPipeline, dtype: np.dtype) -> dict[str, Any]:
    usual = get_scheme(scheme.name, scheme.format, **scheme.chosen)
    scales = scheme.scale_dtype(dtype)
    return {
        "scheme": scheme.name,
        "algorithm": algorithms.name,
        **({"scheme_options": scheme.chosen} if scheme.chosen else {}),
        **({"algorithm_options": algorithms.chosen} if algorithms.chosen else {}),
        **({"scale_dtype": scales.name} if scales != usual.scale_dtype(dtype) else {}),
        **({"fold": scheme.fold.value} if scheme.fold is not usual.fold else {}),
    }


def recorded_way(record: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """What a record says was done to a group, by its full path prefix."""
    mixed = record.get("mixed")
    entry = mixed.get(path) if isinstance(mixed, Mapping) else None
    return entry if isinstance(entry, Mapping) else record


def plan_of_ways(
    config: ModelConfig,
    ways: Mapping[str, Way],
    dtype: np.dtype,
    floats: frozenset[str],
    kv_cache: str,
) -> Plan:
    """The plan of groups that become what they are said to.

    Args:
        config: the model.
        ways: group, by full path prefix, in model order, to what becomes of it; at least one.
        dtype: type of what stays float.
        floats: the groups that stay float.
        kv_cache: how keys and values are cached.
    """
    (scheme, algorithms), *_ = ways.values()
    mixed = {path: way for path, way in ways.items() if way != (scheme, algorithms)}
    return Plan(config, scheme, algorithms, dtype, floats, kv_cache=kv_cache, mixed=mixed)


def check_shapes(plan: Plan, index: int, group: LinearGroup) -> None:
    """Refuses a group that the scheme's groups do not divide or no file can hold.

    Raises:
        MsQuantError: names the linear.
    """
    shapes = plan.config.linear_shapes()
    own = plan.of(index, group)
    for member in group.members:
        name = f"{block_prefix(index)}{member}.weight"
        own.scheme.weight.check_columns(shapes[member][1], name)
        own.format.check(own, group, shapes[member], name)


def why_not_run(plan: Plan, index: int, group: LinearGroup) -> str:
    """Why the format's runtime fails on a group that files can hold; "" where it does not."""
    shapes = plan.config.linear_shapes()
    own = plan.of(index, group)
    for member in group.members:
        if reason := own.format.why_not_run(own, group, shapes[member]):
            return f"{block_prefix(index)}{member}: {reason}"
    return ""


def check_runs(plan: Plan, index: int, group: LinearGroup) -> None:
    """Refuses a group that the runtime fails on.

    Raises:
        MsQuantError: names the linear.
    """
    if reason := why_not_run(plan, index, group):
        raise MsQuantError(reason)
