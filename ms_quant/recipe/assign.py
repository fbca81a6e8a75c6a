"""What a recipe does to one linear."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ms_quant.algorithms import ALGORITHMS, get_algorithms
from ms_quant.algorithms.pipeline import PLAIN
from ms_quant.errors import BadArgumentError, MsQuantError
from ms_quant.recipe.patterns import matches, matches_further, unmatched
from ms_quant.recipe.records import EVERYTHING, Recipe, Rule, Step
from ms_quant.schemes.table import SCHEMES, get_scheme

ADDED = {
    ("svd", "W4A4_MXFP4"): "W4A4_MXFP4_SVD",
    ("flatquant", "W4A4_DYNAMIC"): "W4A4_FLATQUANT_DYNAMIC",
}
"""A step with what it adds beside the weight, and the scheme that a rule gives becomes this one."""


Match = Callable[[str, Sequence[str], Sequence[str]], bool]
"""Whether some pattern includes a path and none excludes it."""


@dataclass(frozen=True)
class LayerChoice:
    """Attributes:
    scheme: name of the scheme.
    options: of its weights.
    algorithms: all of them, those of steps first.
    algorithm_options: by full name.
    """

    scheme: str
    options: Mapping[str, Any] = field(default_factory=dict)
    algorithms: tuple[str, ...] = ()
    algorithm_options: Mapping[str, Any] = field(default_factory=dict)


def assign(
    recipe: Recipe,
    linears: Mapping[str, str],
    producers: Mapping[str, str] | None = None,
    mates: Mapping[str, Sequence[str]] | None = None,
    further: Container[str] = (),
) -> dict[str, LayerChoice]:
    """What is done to which linear.

    Args:
        recipe: a checked one.
        linears: full path of every linear to the kind of its group.
        producers: full path of every linear to that of what makes its input, for steps whose
            patterns name it.
        mates: full path of every linear to those of its group.
        further: paths in layers that predict further tokens, which patterns have to name.

    Returns:
        path to choice, in the order of ``linears``, without those that stay float.

    Raises:
        MsQuantError: two rules reach one, or what reaches one does not go together; names the
            paths of both in the recipe.
    """
    found = {}
    made: dict[tuple[int, ...], LayerChoice] = {}
    for path, group in linears.items():
        match = matches_further if path in further else matches
        rule = _rule(recipe, path, match)
        if rule is not None:
            made_by = path if producers is None else producers.get(path, "")
            together = (path,) if mates is None else mates[path]
            steps = [s for s in recipe.steps if _reaches(s, path, group, made_by, together, match)]
            key = id(rule), *map(id, steps)
            if key not in made:
                made[key] = _choice(path, rule, steps)
            found[path] = made[key]
    return found


def is_reached(recipe: Recipe, path: str, further: bool = False) -> bool:
    """Whether a rule reaches a linear, or one in a layer that predicts further tokens."""
    match = matches_further if further else matches
    return any(match(path, rule.include, rule.exclude) for rule in recipe.rules)


def idle_patterns(
    recipe: Recipe,
    paths: Sequence[str],
    producers: Sequence[str] = (),
    excluded: Sequence[str] = (),
) -> list[tuple[str, str]]:
    """The patterns that match nothing, each after the path of what holds it.

    Args:
        recipe: a checked one.
        paths: of all linears.
        producers: what makes their inputs, for steps whose patterns name it.
        excluded: what is no such linear and may be excluded all the same.
    """
    found = []
    for record in recipe.rules + recipe.steps:
        names = producers if isinstance(record, Step) and record.by_producer else paths
        idle = unmatched(record.include, names) + unmatched(record.exclude, [*names, *excluded])
        found += [(record.where, pattern) for pattern in idle]
    return found


def _rule(recipe: Recipe, path: str, match: Match) -> Rule | None:
    rules = [rule for rule in recipe.rules if match(path, rule.include, rule.exclude)]
    if len(rules) > 1 and not recipe.lenient:
        raise BadArgumentError(
            f"{path}: is reached by {rules[0].where} and {rules[1].where}, expected one; exclude "
            "it from the other"
        )
    return rules[0] if rules else None


def _reaches(
    step: Step, path: str, kind: str, producer: str, mates: Sequence[str], match: Match
) -> bool:
    if ALGORITHMS[step.algorithm].rotates:
        return True  # the whole model
    if step.groups and kind not in step.groups:
        return False
    if step.together and not all(matches(mate, EVERYTHING, step.exclude) for mate in mates):
        return False
    return match(producer if step.by_producer else path, step.include, step.exclude)


def _choice(path: str, rule: Rule, steps: list[Step]) -> LayerChoice:
    name = rule.scheme
    for step in steps:
        name = ADDED.get((step.algorithm, name), name)
    algorithms = tuple(step.algorithm for step in steps) + rule.algorithms
    settings = {f"{s.algorithm}.{key}": value for s in steps for key, value in s.options.items()}
    settings |= rule.algorithm_options
    try:
        get_algorithms("+".join(algorithms) or PLAIN, get_scheme(name, **rule.options), settings)
    except MsQuantError as error:
        wheres = " and ".join([rule.where, *(step.where for step in steps)])
        raise BadArgumentError(f"{wheres}: {path}: {error}") from None
    own = SCHEMES[name].algorithm
    if own and own not in algorithms:
        algorithms = (own, *algorithms)
    return LayerChoice(name, dict(rule.options), algorithms, settings)
