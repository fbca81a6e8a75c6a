"""Making a plan: what is asked for is checked against itself, the formats and the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ms_quant.algorithms import ALGORITHMS, PLAIN
from ms_quant.errors import BadArgumentError
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import GroupId, block_prefix
from ms_quant.pipeline.building import AskedOutput, make, target_of
from ms_quant.pipeline.parts import choices, part_of, parts_of, read_asked
from ms_quant.plan.exclude import float_paths, matches, no_match
from ms_quant.plan.plan import Plan, all_groups
from ms_quant.recipe import LayerChoice, Recipe, assign, idle_patterns, is_reached
from ms_quant.recipe.notes import notes
from ms_quant.recipe.patterns import further_names
from ms_quant.recipe.patterns import matches as reaches
from ms_quant.recipe.records import EVERYTHING


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
        scheme: a name from ``SCHEMES``, or one for each part: ``"W8A8,experts=W4A8_DYNAMIC"``.
        algorithm: names from ``ALGORITHMS`` joined with ``+``, or ``"minmax"``; or some for each
            part.
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
    asked = read_asked(scheme, algorithm, scheme_options or {}, algorithm_options or {})
    chosen = choices(parts_of(config), asked)
    unseen, wanted = set(exclude), dict[GroupId, LayerChoice | None]()
    for found, group in all_groups(config):
        members = [f"{block_prefix(found.block)}{member}" for member in group.members]
        matched = {p for p in exclude if any(fnmatchcase(member, p) for member in members)}
        unseen -= matched
        wanted[found] = None if matched else chosen[part_of(config, found, group)]
    floats = float_paths(config) if unseen else []
    wrong = sorted(pattern for pattern in unseen if not matches(pattern, floats))
    if wrong and wrong[0].startswith("re:"):
        raise BadArgumentError(
            f"exclude pattern {wrong[0]!r} is a regular expression, expected a glob pattern "
            "(recipes take both)"
        )
    if wrong:
        raise BadArgumentError(f"exclude {no_match(wrong[0], linear_paths(config))}")
    target = target_of(smoothing_target)
    return make(
        config, wanted, AskedOutput(dtype, format, target, kv_cache, float_undivided, bool(format))
    )


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
    target = target_of(smoothing_target)
    asked = AskedOutput(
        dtype,
        format,
        target,
        recipe.kv_cache,
        float_undivided,
        must_serve,
        recipe.kv_cache_exclude,
        recipe.lenient,
    )
    return make(config, {found: wanted.get(found) for found, _ in all_groups(config)}, asked)


def _choices(config: ModelConfig, recipe: Recipe) -> dict[GroupId, LayerChoice]:
    """What a recipe asks of each group that it reaches."""
    groups = _groups(config)
    paths = {path: group for group, members in groups.items() for path in members}
    producers = linear_producers(config)
    further = further_paths(config)
    names = [*paths, *(further_names(path)[1] for path in further)]
    _refuse_idle(recipe, names, list(producers.values()), float_paths(config))
    linears = {path: _kind(config, group) for path, group in paths.items()}
    mates = {path: groups[group] for path, group in paths.items()}
    chosen = assign(recipe, linears, producers, mates, further)
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


def further_paths(config: ModelConfig) -> dict[str, None]:
    """Full paths of the linears in layers that predict further tokens."""
    return {
        path: None
        for group, members in _groups(config).items()
        if group.block >= config.num_layers
        for path in members
    }


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
    further = further_paths(config)
    return notes(recipe, groups, linear_producers(config), float_paths(config), further)


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
        named = next((path for path in floats if reaches(path, [pattern])), "")
        if named:
            raise BadArgumentError(
                f"{where}: pattern {pattern!r} names {named}, which is float in every plan, "
                "expected linears that can be quantized"
            )
        raise BadArgumentError(f"{where}: {no_match(pattern, paths)}")
