"""Making a plan: what is asked for is checked against itself, the formats and the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np

from ms_quant.algorithms import ALGORITHMS, PLAIN, get_algorithms
from ms_quant.errors import MsQuantError
from ms_quant.formats.registry import FORMATS
from ms_quant.models.config import ModelConfig, block_prefix
from ms_quant.plan.exclude import float_paths, matches, no_match
from ms_quant.plan.plan import Choices, Plan, Way, check_runs, check_shapes, plan_of_ways
from ms_quant.recipe import Recipe, Treatment, assign, idle_patterns, is_reached
from ms_quant.recipe.notes import notes
from ms_quant.recipe.records import EVERYTHING
from ms_quant.schemes.records import Fold, Scheme
from ms_quant.schemes.table import (
    DYNAMIC_CACHE,
    KV_CACHES,
    SCHEMES,
    STATIC_CACHE,
    get_scheme,
    holding_formats,
    served_formats,
    why_not_held,
)


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
    must_serve = bool(options.format)
    if options.kv_cache in KV_CACHES and not options.format and scheme in SCHEMES:
        for format in served_formats(scheme, **options.scheme):
            if FORMATS[format].holds_cache:
                options = replace(options, format=format)
                break
    way = _way(scheme, algorithm, options, must_serve)
    unseen, ways = set(exclude), {}
    for group, members in _groups(config).items():
        matched = {p for p in exclude if any(fnmatchcase(member, p) for member in members)}
        unseen -= matched
        if not matched:
            ways[group] = way
    floats = float_paths(config) if unseen else []
    wrong = sorted(pattern for pattern in unseen if not matches(pattern, floats))
    if wrong and wrong[0].startswith("re:"):
        raise MsQuantError(
            f"exclude pattern {wrong[0]!r} is a regular expression, expected a glob pattern "
            "(recipes take both)"
        )
    if wrong:
        raise MsQuantError(f"exclude {no_match(wrong[0], linear_paths(config))}")
    return _plan(config, ways, dtype, options, must_serve)


def plan_of_recipe(config: ModelConfig, recipe: Recipe, dtype: np.dtype, options: Choices) -> Plan:
    """The plan of a recipe.

    Args:
        config: the model.
        recipe: a checked one.
        dtype: bfloat16 or float16.
        options: ``format``, ``fold`` and ``float_undivided``; the rest is the recipe's.

    Raises:
        MsQuantError: a pattern matches nothing, fused linears would differ, no format holds all
            schemes, or what :func:`make_plan` refuses; names the key of the recipe.
    """
    if config.model_type in recipe.not_for:
        raise MsQuantError(f"{config.model_type}: {recipe.not_for[config.model_type]}")
    wanted = _treatments(config, recipe)
    format = options.format or _common_format(wanted.values(), recipe.kv_cache)
    must_serve = options.format not in ("", *recipe.formats)  # a recipe may be for a compressor
    asked = replace(options, format=format, kv_cache=recipe.kv_cache)
    made: list[tuple[Treatment, Way]] = []  # a treatment holds mappings, it cannot be a key
    ways = {}
    for group, treatment in wanted.items():
        way = next((way for known, way in made if known == treatment), None)
        if way is None:
            text = "+".join(treatment.algorithms) or PLAIN
            own = replace(asked, scheme=treatment.options, algorithm=treatment.algorithm_options)
            way = _way(treatment.scheme, text, own, must_serve)
            made.append((treatment, way))
        ways[group] = way
    return _plan(config, ways, dtype, asked, must_serve)


def _treatments(config: ModelConfig, recipe: Recipe) -> dict[str, Treatment]:
    """What becomes of each group that a recipe reaches, by full path prefix."""
    groups = _groups(config)
    paths = {path: group for group, members in groups.items() for path in members}
    producers = linear_producers(config)
    _refuse_idle(recipe, list(paths), list(producers.values()), float_paths(config))
    linears = {path: group.rpartition(".")[2] for path, group in paths.items()}
    treated = assign(recipe, linears, producers)
    wanted: dict[str, Treatment] = {}
    for group, members in groups.items():
        found = {path: treated.get(path) for path in members}
        if recipe.lenient and None in found.values():
            continue
        first = found[members[0]]
        for path, treatment in found.items():
            if treatment != first:
                raise MsQuantError(
                    f"{members[0]} would be {_title(first)} and {path} {_title(treatment)}, "
                    "expected one for both: runtimes fuse them"
                )
        if first is not None:
            wanted[group] = first
    return wanted


def _groups(config: ModelConfig) -> dict[str, list[str]]:
    """Full path prefix of every group to the full paths of its linears, in model order."""
    return {
        f"{block_prefix(index)}{group.name}": [f"{block_prefix(index)}{m}" for m in group.members]
        for index in range(config.num_layers)
        for group in config.family.groups
    }


def linear_paths(config: ModelConfig) -> list[str]:
    """Full paths of the decoder linears, in model order."""
    return [path for members in _groups(config).values() for path in members]


def _title(treatment: Treatment | None) -> str:
    if treatment is None:
        return "float"
    return f"{treatment.scheme} with {'+'.join(treatment.algorithms) or PLAIN}"


def linear_producers(config: ModelConfig) -> dict[str, str]:
    """Full path of every linear to that of what makes its input, in model order."""
    return {
        f"{block_prefix(index)}{member}": f"{block_prefix(index)}{group.feed}"
        for index in range(config.num_layers)
        for group in config.family.groups
        for member in group.members
    }


def recipe_notes(config: ModelConfig, recipe: Recipe) -> list[str]:
    """What a recipe says that changes nothing for a model, or less than it says."""
    return notes(recipe, _groups(config), linear_producers(config), float_paths(config))


def _refuse_idle(
    recipe: Recipe, paths: Sequence[str], producers: Sequence[str], floats: Sequence[str]
) -> None:
    """Refuses a pattern that names nothing; one that leaves out what is float anyway may stay."""
    for step in recipe.steps:
        chosen = step.include != EVERYTHING or step.exclude or step.groups
        if ALGORITHMS[step.algorithm].rotates and chosen:
            raise MsQuantError(
                f"{step.where}: {step.algorithm} rotates the whole model, expected it without "
                "include, exclude and groups"
            )
    if recipe.lenient and any(is_reached(recipe, path) for path in paths):
        return  # what is idle is noted
    for where, pattern in idle_patterns(recipe, paths, producers, floats):
        raise MsQuantError(f"{where}: {no_match(pattern, paths)}")


def _common_format(wanted: Iterable[Treatment], kv_cache: str) -> str:
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
    raise MsQuantError(f"no format holds all of {listed}, expected schemes that one does")


def _way(name: str, algorithm: str, options: Choices, must_serve: bool) -> Way:
    scheme = _chosen(name, options, must_serve)
    algorithms = get_algorithms(algorithm, scheme, options.algorithm)
    if not algorithms.any("smooths"):  # there is nothing to hold
        usual = get_scheme(name, scheme.format, **options.scheme)
        fold = Fold.NORM if usual.fold is Fold.MUL_SCALE else usual.fold
        scheme = get_scheme(name, scheme.format, fold, **options.scheme)
    return scheme, algorithms


def _plan(
    config: ModelConfig,
    ways: Mapping[str, Way],
    dtype: np.dtype,
    options: Choices,
    must_serve: bool,
) -> Plan:
    """The plan of some groups; the others stay float.

    Raises:
        MsQuantError: there is no such plan, or no group is left.
    """
    if options.fold and not any(algorithms.any("smooths") for _, algorithms in ways.values()):
        raise MsQuantError(f"fold {options.fold}: no algorithm smooths, expected no --fold")
    if ways:
        _check_cache(next(iter(ways.values()))[0], options.kv_cache)
        floats = frozenset(_groups(config)) - ways.keys()
        plan = plan_of_ways(config, ways, dtype, floats, options.kv_cache)
        undivided = frozenset(_undivided(plan, options.float_undivided, must_serve))
        left = {path: way for path, way in ways.items() if path not in undivided}
        if left:
            return plan_of_ways(config, left, dtype, floats | undivided, options.kv_cache)
    raise MsQuantError("every linear stays float, nothing is left to quantize")


def _chosen(name: str, options: Choices, must_serve: bool) -> Scheme:
    """The scheme as the wanted format holds it; one that no runtime serves may be refused."""
    if options.format and options.format not in FORMATS:
        raise MsQuantError(
            f"format {options.format!r} is unknown, expected one of {', '.join(FORMATS)}"
        )
    folds = {fold.value: fold for fold in Fold}
    if options.fold and options.fold not in folds:
        raise MsQuantError(f"fold {options.fold!r} is unknown, expected one of {', '.join(folds)}")
    scheme = get_scheme(name, options.format, folds.get(options.fold), **options.scheme)
    if not scheme.format and SCHEMES[name].held:
        raise MsQuantError(f"scheme {name}: {why_not_held(name)}")
    if not scheme.format:
        raise MsQuantError(
            f"scheme {name}: is for networks and not for checkpoints of decoders, use "
            f'ms_quant.quantize(network, "{name}", ...)'
        )
    if must_serve and not scheme.served_by:
        reasons = "; ".join(scheme.not_served_by)
        served = served_formats(name, **options.scheme)
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
    if name and not FORMATS[scheme.format].holds_cache:
        able = [
            f"--format {format}"
            for format in served_formats(scheme.name, **scheme.chosen)
            if FORMATS[format].holds_cache
        ] or ["another scheme"]
        raise MsQuantError(
            f"kv cache {name}: a {scheme.format} checkpoint cannot hold it, expected "
            f"{' or '.join(able)}"
        )


def _undivided(plan: Plan, stay_float: bool, must_serve: bool) -> Iterator[str]:
    """The groups with a shape that the scheme's groups do not divide or no file can hold, or which
    the runtime that must serve them fails on.

    Raises:
        MsQuantError: there is one and it may not stay float.
    """
    for index in range(plan.config.num_layers):
        for group in plan.groups(index):
            try:
                check_shapes(plan, index, group)
                if must_serve:
                    check_runs(plan, index, group)
            except MsQuantError as error:
                if not stay_float:
                    sized = "group_size" in plan.of(index, group).scheme.options
                    size = "another group size, or " if sized and "divide" in str(error) else ""
                    raise MsQuantError(
                        f"{error}; expected {size}--float-undivided to leave such linears float"
                    ) from None
                yield f"{block_prefix(index)}{group.name}"
