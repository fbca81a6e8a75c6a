"""What can be refused of a recipe without a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ms_quant.algorithms import ALGORITHMS, get_algorithms
from ms_quant.algorithms.pipeline import PLAIN
from ms_quant.algorithms.table import Stage
from ms_quant.errors import BadArgumentError, MsQuantError
from ms_quant.models.families import FAMILIES
from ms_quant.recipe.patterns import check_pattern
from ms_quant.recipe.records import Recipe, Rule, Step
from ms_quant.schemes.support import SUPPORT
from ms_quant.schemes.table import KV_CACHES, SCHEMES, get_scheme

FORMATS = tuple(dict.fromkeys(row.format for rows in SUPPORT.values() for row in rows))
CHOOSING = (Stage.INPUT, Stage.RANGE, Stage.ROUNDING)
"""Stages that belong to a rule; those of a step are the others."""


def checked(recipe: Recipe) -> Recipe:
    """The recipe, if every name, option and pattern in it is usable.

    Raises:
        MsQuantError: names the path and what is possible there.
    """
    if not recipe.rules:
        raise BadArgumentError(
            "rules: are empty, expected at least one; a cache alone is not quantized"
        )
    for rule in recipe.rules:
        _at(rule.where, _check_rule, rule)
    for step in recipe.steps:
        _at(step.where, _check_step, step)
    if recipe.kv_cache and recipe.kv_cache not in KV_CACHES:
        _unknown("kv_cache", recipe.kv_cache, KV_CACHES)
    for pattern in recipe.kv_cache_exclude:
        check_pattern(pattern)
    if recipe.kv_cache_exclude and not recipe.kv_cache:
        raise BadArgumentError("kv_cache_exclude: there is no kv_cache, expected one")
    for name in recipe.formats:
        if name not in FORMATS:
            _unknown("formats", name, FORMATS)
    for name, least in (("samples", 1), ("seq_len", 1), ("seed", 0), ("shard_bytes", 0)):
        value = getattr(recipe, name)
        if value is not None and value < least:
            raise BadArgumentError(f"{name} is {value}, expected at least {least}")
    return recipe


def _at(where: str, check: Any, record: Rule | Step) -> None:
    try:
        check(record)
    except MsQuantError as error:
        raise BadArgumentError(f"{where}: {error}" if where else str(error)) from None


def _check_rule(rule: Rule) -> None:
    _check_patterns(rule)
    for name in rule.algorithms:
        _check_stage(name, [n for n, row in ALGORITHMS.items() if row.stage in CHOOSING])
    scheme = get_scheme(rule.scheme, **rule.options)
    algorithms = get_algorithms("+".join(rule.algorithms) or PLAIN, scheme, rule.algorithm_options)
    for key, value in rule.algorithm_options.items():
        owner, _, option = key.rpartition(".")
        if owner:
            _check_type(key, value, getattr(algorithms.options[owner], option))
        else:
            raise BadArgumentError(f"option {key!r}: expected its full name, such as gptq.damping")


def _check_step(step: Step) -> None:
    _check_patterns(step)
    possible = [name for name, row in ALGORITHMS.items() if row.stage not in CHOOSING]
    _check_stage(step.algorithm, possible)
    known = dict.fromkeys(kind for family in FAMILIES.values() for kind in family.kinds)
    for name in step.groups:
        if name not in known:
            _unknown("groups", name, known)
    suits = ALGORITHMS[step.algorithm].suits
    scheme = next(scheme for scheme in SCHEMES.values() if not suits(scheme))
    options = {f"{step.algorithm}.{key}": value for key, value in step.options.items()}
    made = get_algorithms(step.algorithm, scheme, options).options[step.algorithm]
    for key, value in step.options.items():
        _check_type(key, value, getattr(made, key))


def _check_patterns(record: Rule | Step) -> None:
    if not record.include:
        raise BadArgumentError("include is empty, expected at least one pattern, such as '*'")
    for pattern in record.include + record.exclude:
        check_pattern(pattern)


def _check_stage(name: str, possible: list[str]) -> None:
    if name not in possible:
        _unknown("algorithm", name, possible)


def _check_type(name: str, value: Any, made: Any) -> None:
    """Refuses text for a number and true for 1, which options of a command line may be."""
    if type(made) is not type(value) and not (type(made) is float and type(value) is int):
        raise BadArgumentError(f"option {name} is {value!r:.80}, expected a {type(made).__name__}")


def _unknown(what: str, name: str, known: Mapping[str, Any] | list[str] | tuple[str, ...]) -> None:
    raise BadArgumentError(
        f"{what} {name!r:.80} is unknown here, expected one of {', '.join(known)}"
    )
