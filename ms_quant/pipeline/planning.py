"""Making a plan: what is asked for is checked against itself, the formats and the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ms_quant.algorithms import ALGORITHMS, PLAIN
from ms_quant.errors import BadArgumentError, MsQuantError, UnsupportedError
from ms_quant.formats.checks import check_runs, check_shapes
from ms_quant.formats.registry import FORMATS
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import GroupId, block_prefix
from ms_quant.plan.exclude import float_paths, matches, no_match
from ms_quant.plan.folding import check_edges
from ms_quant.plan.layer import LayerPlan, layer_plan
from ms_quant.plan.plan import Plan, all_groups
from ms_quant.recipe import LayerChoice, Recipe, assign, idle_patterns, is_reached
from ms_quant.recipe.notes import notes
from ms_quant.recipe.records import EVERYTHING
from ms_quant.schemes.storage import SmoothingTarget
from ms_quant.schemes.support import holding_formats, served_formats
from ms_quant.schemes.table import DYNAMIC_CACHE, KV_CACHES, SCHEMES, STATIC_CACHE


@dataclass(frozen=True)
class _Asked:
    """What was asked of the whole checkpoint.

    Attributes:
        dtype: of what stays float.
        format: the checkpoint format; "" is the one that the scheme has by default.
        target: where smoothing vectors go; None is the format's first choice.
        kv_cache: how keys and values are cached: one of ``KV_CACHES``, or "" for as they are.
        float_undivided: leave linears float whose inputs groups do not divide, instead of
            refusing.
        must_serve: whether some runtime has to serve the output.
    """

    dtype: np.dtype
    format: str
    target: SmoothingTarget | None
    kv_cache: str
    float_undivided: bool
    must_serve: bool


def make_plan(
    config: ModelConfig,
    scheme: str,
    algorithm: str,
    *,
    dtype: np.dtype,
    exclude: Sequence[str] = (),
    scheme_options: Mapping[str, Any] | None = None,
    algorithm_options: Mapping[str, Any] | None = None,
    format: str = "",
    smoothing_target: str = "",
    kv_cache: str = "",
    float_undivided: bool = False,
) -> Plan:
    """Checks the choices against each other and the model.

    Args:
        config: the model.
        scheme: a name from ``SCHEMES``.
        algorithm: names from ``ALGORITHMS`` joined with ``+``, or ``"minmax"``.
        dtype: bfloat16 or float16.
        exclude: glob patterns of linears that stay float. Serving runtimes fuse q/k/v and
            gate/up, so the whole group of a matched linear stays float.
        scheme_options: options of the scheme's weights, such as ``group_size``.
        algorithm_options: options of the algorithms, such as ``alpha`` or ``gptq.damping``.
        format: the checkpoint format; "" is the one that the scheme has by default.
        smoothing_target: where smoothing vectors go, by a name of :class:`SmoothingTarget`; "" is
            the format's first choice.
        kv_cache: how keys and values are cached: one of ``KV_CACHES``, or "" for as they are.
        float_undivided: leave linears float whose inputs groups do not divide, instead of refusing.

    Raises:
        MsQuantError: an unknown name, a combination that no checkpoint can hold, a pattern that
            matches nothing, a size that groups do not divide, or nothing left to quantize.
    """
    options, must_serve = scheme_options or {}, bool(format)
    if kv_cache in KV_CACHES and not format and scheme in SCHEMES:
        served = served_formats(scheme, **options)
        format = next((name for name in served if FORMATS[name].holds_cache), "")
    asked = _Asked(dtype, format, _target(smoothing_target), kv_cache, float_undivided, must_serve)
    layer = _layer(LayerChoice(scheme, options, (algorithm,), algorithm_options or {}), asked)
    unseen, layers = set(exclude), {}
    for group, members in _groups(config).items():
        matched = {p for p in exclude if any(fnmatchcase(member, p) for member in members)}
        unseen -= matched
        further = group.block >= config.num_layers
        layers[group] = None if matched or further else layer
    floats = float_paths(config) if unseen else []
    wrong = sorted(pattern for pattern in unseen if not matches(pattern, floats))
    if wrong and wrong[0].startswith("re:"):
        raise BadArgumentError(
            f"exclude pattern {wrong[0]!r} is a regular expression, expected a glob pattern "
            "(recipes take both)"
        )
    if wrong:
        raise BadArgumentError(f"exclude {no_match(wrong[0], linear_paths(config))}")
    return _plan(config, layers, asked)


def plan_of_recipe(
    config: ModelConfig,
    recipe: Recipe,
    dtype: np.dtype,
    *,
    format: str = "",
    smoothing_target: str = "",
    float_undivided: bool = False,
) -> Plan:
    """The plan of a recipe.

    Args:
        config: the model.
        recipe: a checked one.
        dtype: bfloat16 or float16.
        format, smoothing_target, float_undivided: as of :func:`make_plan`; the rest is the
            recipe's.

    Raises:
        MsQuantError: a pattern matches nothing, fused linears would differ, no format holds all
            schemes, or what :func:`make_plan` refuses; names the key of the recipe.
    """
    if config.model_type in recipe.not_for:
        raise BadArgumentError(f"{config.model_type}: {recipe.not_for[config.model_type]}")
    wanted = _choices(config, recipe)
    must_serve = format not in ("", *recipe.formats)  # a recipe may be for a compressor
    format = format or _common_format(wanted.values(), recipe.kv_cache)
    asked = _Asked(
        dtype, format, _target(smoothing_target), recipe.kv_cache, float_undivided, must_serve
    )
    made: list[tuple[LayerChoice, LayerPlan]] = []  # a choice holds mappings, it cannot be a key
    layers: dict[GroupId, LayerPlan | None] = dict.fromkeys(_groups(config))
    for group, choice in wanted.items():
        layer = next((layer for known, layer in made if known == choice), None)
        if layer is None:
            layer = _layer(choice, asked)
            made.append((choice, layer))
        layers[group] = layer
    return _plan(config, layers, asked)


def _target(name: str) -> SmoothingTarget | None:
    known = [target.value for target in SmoothingTarget]
    if name and name not in known:
        raise BadArgumentError(
            f"smoothing target {name!r} is unknown, expected one of {', '.join(known)}"
        )
    return SmoothingTarget(name) if name else None


def _choices(config: ModelConfig, recipe: Recipe) -> dict[GroupId, LayerChoice]:
    """What a recipe asks of each group that it reaches."""
    groups = _groups(config)
    paths = {path: group for group, members in groups.items() for path in members}
    producers = linear_producers(config)
    _refuse_idle(recipe, list(paths), list(producers.values()), float_paths(config))
    linears = {path: _kind(config, group) for path, group in paths.items()}
    mates = {path: groups[group] for path, group in paths.items()}
    chosen = assign(recipe, linears, producers, mates)
    wanted: dict[GroupId, LayerChoice] = {}
    for group, members in groups.items():
        found = {path: chosen.get(path) for path in members}
        if recipe.lenient and None in found.values():
            continue
        first = found[members[0]]
        for path, choice in found.items():
            if choice != first:
                raise BadArgumentError(
                    f"{members[0]} would be {_title(first)} and {path} {_title(choice)}, "
                    "expected one for both: runtimes fuse them"
                )
        if first is not None:
            wanted[group] = first
    return wanted


def _groups(config: ModelConfig) -> dict[GroupId, list[str]]:
    """Every group to the full paths of its linears, in model order."""
    return {
        found: [f"{block_prefix(found.block)}{member}" for member in group.members]
        for found, group in all_groups(config)
    }


def _kind(config: ModelConfig, group: GroupId) -> str:
    return config.block(group.block).group(group.name).kind


def linear_paths(config: ModelConfig) -> list[str]:
    """Full paths of the decoder linears, in model order."""
    return [path for members in _groups(config).values() for path in members]


def _title(choice: LayerChoice | None) -> str:
    if choice is None:
        return "float"
    return f"{choice.scheme} with {'+'.join(choice.algorithms) or PLAIN}"


def linear_producers(config: ModelConfig) -> dict[str, str]:
    """Full path of every linear to that of what makes its input, in model order."""
    return {
        f"{block_prefix(block.index)}{member}": f"{block_prefix(block.index)}{edge.producer}"
        for block in config.stored_blocks
        for group in block.groups
        for member in group.members
        if (edge := block.producer_of(group))
    }


def recipe_notes(config: ModelConfig, recipe: Recipe) -> list[str]:
    """What a recipe says that changes nothing for a model, or less than it says."""
    groups = {str(group): members for group, members in _groups(config).items()}
    return notes(recipe, groups, linear_producers(config), float_paths(config))


def _refuse_idle(
    recipe: Recipe, paths: Sequence[str], producers: Sequence[str], floats: Sequence[str]
) -> None:
    """Refuses a pattern that names nothing; one that leaves out what is float anyway may stay."""
    for step in recipe.steps:
        chosen = step.include != EVERYTHING or step.exclude or step.groups
        if ALGORITHMS[step.algorithm].rotates and chosen:
            raise BadArgumentError(
                f"{step.where}: {step.algorithm} rotates the whole model, expected it without "
                "include, exclude and groups"
            )
    if recipe.lenient and any(is_reached(recipe, path) for path in paths):
        return  # what is idle is noted
    for where, pattern in idle_patterns(recipe, paths, producers, floats):
        raise BadArgumentError(f"{where}: {no_match(pattern, paths)}")


def _common_format(wanted: Iterable[LayerChoice], kv_cache: str) -> str:
    """The first format in which a runtime serves every scheme, else the first that holds all."""
    able = [name for name, row in FORMATS.items() if row.holds_cache or not kv_cache]
    names = list(dict.fromkeys((t.scheme, tuple(t.options.items())) for t in wanted))
    held = [holding_formats(name, **dict(options)) for name, options in names]
    served = [served_formats(name, **dict(options)) for name, options in names]
    for choices in (served, held):
        first, *others = choices or [[]]
        for format in first:
            if format in able and all(format in other for other in others):
                return format
    if not names:
        return ""
    listed = ", ".join(dict.fromkeys(name for name, _ in names))
    raise BadArgumentError(f"no format holds all of {listed}, expected schemes that one does")


def _layer(choice: LayerChoice, asked: _Asked) -> LayerPlan:
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


def _plan(config: ModelConfig, layers: Mapping[GroupId, LayerPlan | None], asked: _Asked) -> Plan:
    """The plan of some layers.

    Raises:
        MsQuantError: there is no such plan, or no group is left.
    """
    first = next((layer for layer in layers.values() if layer is not None), None)
    if first is None:
        raise BadArgumentError("every linear stays float, nothing is left to quantize")
    plan = Plan(config, first.storage.format, layers, asked.dtype, kv_cache=asked.kv_cache)
    if asked.target and not plan.any("smooths"):
        raise BadArgumentError(
            f"smoothing target {asked.target.value}: no algorithm smooths, expected no --fold"
        )
    _check_cache(first, asked.kv_cache)
    undivided = set(_undivided(plan, asked))
    left = {group: None if group in undivided else layer for group, layer in layers.items()}
    if not any(left.values()):
        raise BadArgumentError("every linear stays float, nothing is left to quantize")
    plan = replace(plan, layers=left)
    check_edges(plan)
    return plan


def _check_cache(layer: LayerPlan, name: str) -> None:
    """Refuses a kind of cache that no checkpoint of a scheme holds."""
    scheme, format = layer.scheme, layer.storage.format
    if name == DYNAMIC_CACHE:
        raise BadArgumentError(
            f"kv cache {name} scales tokens at run time and needs nothing in a checkpoint; "
            f"ms-quant eval and generate take --kv-cache {name} for any checkpoint"
        )
    if name and name not in KV_CACHES:
        raise BadArgumentError(f"kv cache {name!r} is unknown, expected {STATIC_CACHE!r}")
    if name and not FORMATS[format].holds_cache:
        able = [
            f"--format {other}"
            for other in served_formats(scheme.name, **scheme.chosen)
            if FORMATS[other].holds_cache
        ] or ["another scheme"]
        raise UnsupportedError(
            f"kv cache {name}: a {format} checkpoint cannot hold it, expected {' or '.join(able)}"
        )


def _undivided(plan: Plan, asked: _Asked) -> Iterator[GroupId]:
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
            if asked.must_serve:
                check_runs(plan, found.block, group)
        except MsQuantError as error:
            if not asked.float_undivided:
                sized = "group_size" in layer.scheme.options
                size = "another group size, or " if sized and "divide" in str(error) else ""
                raise BadArgumentError(
                    f"{error}; expected {size}--float-undivided to leave such linears float"
                ) from None
            yield found
