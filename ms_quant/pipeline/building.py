"""A plan of choices: in the format that is asked for, or in the first one that a runtime serves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ms_quant.algorithms import PLAIN
from ms_quant.errors import BadArgumentError, MsQuantError, UnsupportedError
from ms_quant.formats.checks import check_runs, check_shapes, not_served_by, served_by
from ms_quant.formats.registry import FORMATS
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import GroupId, block_prefix
from ms_quant.plan.folding import check_edges
from ms_quant.plan.layer import LayerPlan, layer_plan
from ms_quant.plan.plan import Plan, all_groups
from ms_quant.plan.targets import check_parts
from ms_quant.recipe import LayerChoice
from ms_quant.recipe.patterns import matches
from ms_quant.schemes.storage import SmoothingTarget
from ms_quant.schemes.support import holding_formats, served_formats
from ms_quant.schemes.table import ABSMAX_CACHE, DYNAMIC_CACHE, FLOAT_CACHE, KV_CACHES, STATIC_CACHE

Wanted = Mapping[GroupId, LayerChoice | None]
"""What is asked of every group, in model order; None stays float."""


@dataclass(frozen=True)
class AskedOutput:
    """What was asked of the whole checkpoint.

    Attributes:
        dtype: of what stays float.
        format: the checkpoint format; "" is the one that the scheme has by default.
        target: where smoothing vectors go; None is the format's first choice.
        kv_cache: how keys and values are cached: one of ``KV_CACHES``, or "" for as they are.
        float_undivided: leave linears float whose inputs groups do not divide, instead of
            refusing.
        must_serve: whether some runtime has to serve the output.
        kv_cache_exclude: patterns of attention whose cache stays float all the same.
        lenient: whether a pattern may match nothing.
    """

    dtype: np.dtype
    format: str
    target: SmoothingTarget | None
    kv_cache: str
    float_undivided: bool
    must_serve: bool
    kv_cache_exclude: tuple[str, ...] = ()
    lenient: bool = False


def make(config: ModelConfig, wanted: Wanted, asked: AskedOutput) -> Plan:
    """The plan of what is asked of each group.

    Raises:
        MsQuantError: there is no such plan, no group is left to quantize, or no runtime serves it
            and one has to.
    """
    formats = [asked.format] if asked.format else _formats(wanted.values(), asked)
    if asked.format or not _has_parts(config):
        plan = _built(config, wanted, replace(asked, format=formats[0]))
        if asked.must_serve and _has_parts(config) and not served_by(plan):
            _refuse_unserved(plan, wanted, asked)
        return plan
    plans = list(_possible(config, wanted, asked, formats))
    if not plans:  # each is refused
        return _built(config, wanted, replace(asked, format=formats[0]))
    return next((plan for plan in plans if served_by(plan)), plans[0])


def _has_parts(config: ModelConfig) -> bool:
    """Whether runtimes have rules about parts of such a model."""
    return config.routing is not None or config.latent is not None


def _possible(
    config: ModelConfig, wanted: Wanted, asked: AskedOutput, formats: Iterable[str]
) -> Iterator[Plan]:
    """The plans of some formats that can be made, up to the first that a runtime serves."""
    for format in formats:
        try:
            plan = _built(config, wanted, replace(asked, format=format))
        except MsQuantError:
            continue
        yield plan
        if served_by(plan):
            return


def _refuse_unserved(plan: Plan, wanted: Wanted, asked: AskedOutput) -> None:
    """Says why no runtime serves a plan, and in which formats one would."""
    others = [name for name in _formats(wanted.values(), asked) if name not in ("", asked.format)]
    able = [p.format for p in _possible(plan.config, wanted, asked, others) if served_by(p)]
    raise UnsupportedError(
        f"format {asked.format}: {'; '.join(not_served_by(plan))}; expected "
        f"{' or '.join([f'--format {name}' for name in able] or ['another plan'])}, or no --format "
        "for a checkpoint that ms-quant alone reads"
    )


def target_of(name: str) -> SmoothingTarget | None:
    """The smoothing target of a name, None for ""."""
    known = [target.value for target in SmoothingTarget]
    if name and name not in known:
        raise BadArgumentError(
            f"smoothing target {name!r} is unknown, expected one of {', '.join(known)}"
        )
    return SmoothingTarget(name) if name else None


def _formats(wanted: Iterable[LayerChoice | None], asked: AskedOutput) -> list[str]:
    """Formats that hold every scheme, those first in which a runtime serves every one; "" alone is
    the one that a scheme has by default."""
    able = [name for name, row in FORMATS.items() if row.holds_cache or not asked.kv_cache]
    chosen = {id(choice): choice for choice in wanted if choice is not None}.values()
    names = list(dict.fromkeys((one.scheme, tuple(one.options.items())) for one in chosen))
    held = [holding_formats(name, **dict(options)) for name, options in names]
    served = [served_formats(name, **dict(options)) for name, options in names]
    found: dict[str, None] = {}
    for first, *others in filter(None, (served, held)):
        common = (name for name in first if all(name in other for other in others))
        found |= dict.fromkeys(name for name in common if name in able)
    if found or len(names) < 2:
        return list(found) or [""]
    listed = ", ".join(dict.fromkeys(name for name, _ in names))
    raise BadArgumentError(f"no format holds all of {listed}, expected schemes that one does")


def _layer(choice: LayerChoice, asked: AskedOutput) -> LayerPlan:
    """The layer plan of a choice; one that no runtime serves may be refused."""
    if asked.format and asked.format not in FORMATS:
        raise BadArgumentError(
            f"format {asked.format!r} is unknown, expected one of {', '.join(FORMATS)}"
        )
    layer = layer_plan(
        choice.scheme,
        "+".join(choice.algorithms) or PLAIN,
        asked.dtype,
        options=choice.options,
        settings=choice.algorithm_options,
        format=asked.format,
        target=asked.target,
    )
    support = layer.storage.support
    if asked.must_serve and not support.served_by:
        reasons = "; ".join(support.not_served_by)
        served = served_formats(choice.scheme, **choice.options)
        raise UnsupportedError(
            f"format {asked.format}: scheme {choice.scheme} would be served by no runtime "
            f"({reasons}), expected {' or '.join(served) or 'no --format'}"
        )
    return layer


def _built(config: ModelConfig, wanted: Wanted, asked: AskedOutput) -> Plan:
    """The plan in one format.

    Raises:
        MsQuantError: there is no such plan, or no group is left.
    """
    made: dict[int, tuple[LayerChoice, LayerPlan]] = {}
    layers: dict[GroupId, LayerPlan | None] = {}
    for group, choice in wanted.items():
        if choice is not None and id(choice) not in made:
            # A choice holds mappings, it cannot be a key.
            same = next((layer for known, layer in made.values() if known == choice), None)
            made[id(choice)] = choice, same or _layer(choice, asked)
        layers[group] = None if choice is None else made[id(choice)][1]
    first = next((layer for layer in layers.values() if layer is not None), None)
    if first is None:
        raise BadArgumentError("every linear stays float, nothing is left to quantize")
    plan = Plan(
        config,
        first.storage.format,
        layers,
        asked.dtype,
        kv_cache=asked.kv_cache,
        float_caches=_float_caches(config, asked),
    )
    if asked.target and not plan.any("smooths"):
        raise BadArgumentError(
            f"smoothing target {asked.target.value}: no algorithm smooths, expected no --fold"
        )
    _check_cache(config, first, asked.kv_cache)
    undivided = set(_undivided(plan, asked))
    left = {group: None if group in undivided else layer for group, layer in layers.items()}
    if not any(left.values()):
        raise BadArgumentError("every linear stays float, nothing is left to quantize")
    plan = replace(plan, layers=left)
    check_parts(plan)
    check_edges(plan)
    return plan


def check_cache_kind(config: ModelConfig, name: str) -> None:
    """Refuses a kind of static cache that a model has no place for."""
    heads = any(spec.heads for block in config.blocks for spec in block.cached.values())
    if name == ABSMAX_CACHE and not heads:
        raise BadArgumentError(
            f"kv cache {name} is of latent attention, which {config.model_type} has none of, "
            f"expected {STATIC_CACHE}, whose scales are of largest magnitudes there"
        )


def _check_cache(config: ModelConfig, layer: LayerPlan, name: str) -> None:
    """Refuses a kind of cache that no checkpoint of a scheme holds."""
    scheme, format = layer.scheme, layer.storage.format
    if name == DYNAMIC_CACHE:
        raise BadArgumentError(
            f"kv cache {name} scales tokens at run time and needs nothing in a checkpoint; "
            f"ms-quant eval and generate take --kv-cache {name} for any checkpoint"
        )
    if name and name not in KV_CACHES:
        known = ", ".join((FLOAT_CACHE, STATIC_CACHE, ABSMAX_CACHE))
        raise BadArgumentError(f"kv cache {name!r} is unknown, expected one of {known}")
    check_cache_kind(config, name)
    if name and not FORMATS[format].holds_cache:
        able = [
            f"--format {other}"
            for other in served_formats(scheme.name, **scheme.chosen)
            if FORMATS[other].holds_cache
        ] or ["another scheme"]
        raise UnsupportedError(
            f"kv cache {name}: a {format} checkpoint cannot hold it, expected {' or '.join(able)}"
        )


def _float_caches(config: ModelConfig, asked: AskedOutput) -> frozenset[int]:
    """The blocks whose cache stays float.

    Raises:
        MsQuantError: a pattern matches nothing, nothing is left, or runtimes have one cache for all
            blocks.
    """
    found, unmatched = set[int](), set(asked.kv_cache_exclude)
    for block in config.blocks if unmatched else ():
        if any(not spec.heads for spec in block.cached.values()):
            raise UnsupportedError(
                f"kv_cache_exclude: runtimes have one kind of cache for all blocks of "
                f"{config.model_type}, expected none"
            )
        paths = [f"{block_prefix(block.index)}{path}" for path in block.cached]
        paths += [path.rpartition(".")[0] for path in paths]
        matched = {p for p in asked.kv_cache_exclude if any(matches(path, [p]) for path in paths)}
        found |= {block.index} if matched else set()
        unmatched -= matched
    if unmatched and not asked.lenient:
        raise BadArgumentError(
            f"kv_cache_exclude: pattern {min(unmatched)!r} matches no attention, expected one "
            "such as 'model.layers.0.self_attn'"
        )
    if found and len(found) == config.num_layers:
        raise BadArgumentError("kv_cache_exclude: every cache stays float, expected no kv_cache")
    return frozenset(found)


def _undivided(plan: Plan, asked: AskedOutput) -> Iterator[GroupId]:
    """The groups with a shape that the scheme's groups do not divide or no file can hold, or which
    the runtime that must serve them fails on.

    Raises:
        MsQuantError: there is one and it may not stay float.
    """
    for found, group in all_groups(plan.config):
        layer = plan.layers[found]
        if layer is None:
            continue
        try:
            check_shapes(plan, found.block, group)
            if asked.must_serve and not group.routed:  # experts have rules of their own
                check_runs(plan, found.block, group)
        except MsQuantError as error:
            if not asked.float_undivided:
                sized = "group_size" in layer.scheme.options
                size = "another group size, or " if sized and "divide" in str(error) else ""
                raise BadArgumentError(
                    f"{error}; expected {size}--float-undivided to leave such linears float"
                ) from None
            yield found
