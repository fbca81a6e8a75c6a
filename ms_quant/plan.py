"""What will be done to which linear of a model, decided and checked before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ms_quant.algorithms import Chain, get_chain
from ms_quant.budget import SEARCH_TOKENS
from ms_quant.checkpoint.flavour import Flavour
from ms_quant.checkpoint.flavours import FLAVOURS
from ms_quant.errors import MsQuantError
from ms_quant.models.config import ModelConfig, block_prefix
from ms_quant.models.families import LinearGroup
from ms_quant.schemes import (
    DYNAMIC_CACHE,
    KV_CACHES,
    STATIC_CACHE,
    get_scheme,
    served_flavours,
)
from ms_quant.spec import Fold, Scheme


@dataclass(frozen=True)
class Choices:
    """Attributes:
    scheme: options of the scheme's weights, such as ``group_size``.
    algorithm: options of the algorithms, such as ``alpha`` or ``gptq.damping``.
    float_undivided: leave linears float whose inputs groups do not divide, instead of refusing.
    kv_cache: how keys and values are cached: one of ``KV_CACHES``, or "" for as they are.
    format: the checkpoint flavour; "" is the one that the scheme has by default.
    fold: where smoothing vectors go, by a name of :class:`Fold`; "" is the flavour's first choice.
    """

    scheme: Mapping[str, Any] = field(default_factory=dict)
    algorithm: Mapping[str, Any] = field(default_factory=dict)
    float_undivided: bool = False
    kv_cache: str = ""
    format: str = ""
    fold: str = ""


@dataclass(frozen=True)
class Plan:
    """Attributes:
    config: the model.
    scheme: what its linears become.
    chain: the algorithms.
    dtype: type of what stays float in the output.
    float_groups: full path prefixes of the groups that stay float, such as
        ``"model.layers.0.down"``.
    search_tokens: searches look at this many of the calibration tokens, at most.
    kv_cache: how keys and values are cached, one of ``KV_CACHES``, or "".
    """

    config: ModelConfig
    scheme: Scheme
    chain: Chain
    dtype: np.dtype
    float_groups: frozenset[str] = frozenset()
    search_tokens: int = SEARCH_TOKENS
    kv_cache: str = ""

    @property
    def algorithm(self) -> str:
        """The names of the algorithms, joined."""
        return self.chain.name

    @property
    def flavour(self) -> Flavour:
        """What the output's files hold."""
        return FLAVOURS[self.scheme.flavour]

    @property
    def needs_calibration(self) -> bool:
        return (
            self.scheme.needs_calibration
            or self.chain.any("calibrated")
            or self.kv_cache == STATIC_CACHE
        )

    @property
    def place(self) -> dict[str, str]:
        """The flavour and the fold, where they are not the scheme's defaults, for records."""
        usual, found = get_scheme(self.scheme.name, **self.scheme.chosen), {}
        if self.scheme.flavour != usual.flavour:
            found["format"] = self.scheme.flavour
        if self.scheme.fold is not get_scheme(self.scheme.name, self.scheme.flavour).fold:
            found["fold"] = self.scheme.fold.value
        return found

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


def make_plan(
    config: ModelConfig,
    scheme: str,
    algorithm: str,
    *,
    dtype: np.dtype,
    exclude: Sequence[str] = (),
    options: Choices | None = None,
) -> Plan:
    """Checks the choices against each other and the model.

    Args:
        config: the model.
        scheme: a name from ``SCHEMES``.
        algorithm: names from ``ALGORITHMS`` joined with ``+``, or ``"minmax"``.
        dtype: bfloat16 or float16.
        exclude: glob patterns of linears that stay float. Serving runtimes fuse q/k/v and
            gate/up, so the whole group of a matched linear stays float.
        options: what else was chosen.

    Raises:
        MsQuantError: an unknown name, a combination that no checkpoint can hold, a pattern that
            matches nothing, a size that groups do not divide, or nothing left to quantize.
    """
    options = options or Choices()
    chosen = _chosen(scheme, options)
    _check_cache(chosen, options.kv_cache)
    chain = get_chain(algorithm, chosen, options.algorithm)
    floats, unmatched = set(), set(exclude)
    for index in range(config.num_layers):
        for group in config.family.groups:
            for member in group.members:
                path = f"{block_prefix(index)}{member}"
                matched = [pattern for pattern in exclude if fnmatchcase(path, pattern)]
                unmatched.difference_update(matched)
                if matched:
                    floats.add(f"{block_prefix(index)}{group.name}")
    if unmatched:
        raise MsQuantError(
            f"exclude pattern {min(unmatched)!r} matches no linear, expected something like "
            "'model.layers.0.*' or '*.down_proj'"
        )
    plan = Plan(config, chosen, chain, dtype, frozenset(floats), kv_cache=options.kv_cache)
    undivided = frozenset(_undivided(plan, options.float_undivided))
    plan = replace(plan, float_groups=plan.float_groups | undivided)
    if not plan.quantized():
        raise MsQuantError("every linear stays float, nothing is left to quantize")
    return plan


def _chosen(name: str, options: Choices) -> Scheme:
    """The scheme as the wanted flavour holds it."""
    if options.format and options.format not in FLAVOURS:
        raise MsQuantError(
            f"format {options.format!r} is unknown, expected one of {', '.join(FLAVOURS)}"
        )
    folds = {fold.value: fold for fold in Fold}
    if options.fold and options.fold not in folds:
        raise MsQuantError(f"fold {options.fold!r} is unknown, expected one of {', '.join(folds)}")
    scheme = get_scheme(name, options.format, folds.get(options.fold), **options.scheme)
    if not scheme.flavour:
        raise MsQuantError(
            f"scheme {name}: is for networks and not for checkpoints of decoders, use "
            f'ms_quant.quantize(network, "{name}", ...)'
        )
    if options.format and not scheme.served_by:
        reasons = "; ".join(scheme.not_served_by)
        served = served_flavours(name, **options.scheme)
        raise MsQuantError(
            f"format {options.format}: scheme {name} would be served by no runtime ({reasons}), "
            f"expected {' or '.join(served) or 'no --format'}"
        )
    return scheme


def _check_cache(scheme: Scheme, name: str) -> None:
    """Refuses a kind of cache that no checkpoint of a scheme holds."""
    if name == DYNAMIC_CACHE:
        raise MsQuantError(
            f"kv cache {name} scales tokens at run time and needs nothing in a checkpoint; "
            f"ms-quant eval and generate take --kv-cache {name} for any checkpoint"
        )
    if name and name not in KV_CACHES:
        raise MsQuantError(f"kv cache {name!r} is unknown, expected {STATIC_CACHE!r}")
    if name and not FLAVOURS[scheme.flavour].holds_cache:
        able = [f"--format {row.name}" for row in FLAVOURS.values() if row.holds_cache]
        raise MsQuantError(
            f"kv cache {name}: a {scheme.flavour} checkpoint cannot hold it, expected "
            f"{' or '.join(able)}"
        )


def _undivided(plan: Plan, stay_float: bool) -> Iterator[str]:
    """The groups with a shape that the scheme's groups do not divide or no file can hold.

    Raises:
        MsQuantError: there is one and it may not stay float.
    """
    for index in range(plan.config.num_layers):
        for group in plan.groups(index):
            try:
                check_shapes(plan, index, group)
            except MsQuantError as error:
                if not stay_float:
                    raise MsQuantError(
                        f"{error}; expected another group size, or --float-undivided to leave "
                        "such linears float"
                    ) from None
                yield f"{block_prefix(index)}{group.name}"


def check_shapes(plan: Plan, index: int, group: LinearGroup) -> None:
    """Refuses a group that the scheme's groups do not divide or no file can hold.

    Raises:
        MsQuantError: names the linear.
    """
    shapes = plan.config.linear_shapes()
    for member in group.members:
        name = f"{block_prefix(index)}{member}.weight"
        plan.scheme.weight.check_columns(shapes[member][1], name)
        plan.flavour.check(plan, group, shapes[member], name)
