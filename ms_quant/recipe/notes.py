"""What a recipe says that changes nothing for a model, or less than it says."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches

from ms_quant.recipe.assign import idle_patterns, is_reached
from ms_quant.recipe.patterns import further_names
from ms_quant.recipe.records import Recipe

COMPARED = 2000
"""Names that are looked at for one that is near a pattern."""


def notes(
    recipe: Recipe,
    groups: Mapping[str, Sequence[str]],
    producers: Mapping[str, str],
    excluded: Sequence[str],
    further: Collection[str] = (),
) -> list[str]:
    """One sentence each, for whoever runs a recipe on a model.

    Args:
        recipe: a checked one.
        groups: of linears that runtimes fuse, by any name, with their full paths.
        producers: full path of every linear to that of what makes its input.
        excluded: what is no such linear and may be excluded all the same.
        further: paths in layers that predict further tokens.
    """
    paths = [*producers, *(further_names(path)[1] for path in further)]
    idle = idle_patterns(recipe, paths, list(producers.values()), excluded)
    names = list(dict.fromkeys([*producers, *producers.values()]))
    found = [*recipe.notes, *_idle(idle, names), *_float_mates(recipe, groups, further)]
    return found + list(_further(recipe, further))


def _idle(found: Sequence[tuple[str, str]], names: Sequence[str]) -> Iterator[str]:
    by_place: dict[str, list[str]] = {}
    for where, pattern in found:
        by_place.setdefault(where, []).append(pattern)
    for where, patterns in by_place.items():
        what = f"pattern {patterns[0]!r} matches"
        if len(patterns) > 1:
            what = f"{len(patterns)} patterns, {patterns[0]!r} the first, match"
        near = _nearest(patterns[0], names)
        yield f"{where}: {what} nothing of this model{f'; near it is {near!r}' if near else ''}"


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """A name like a pattern: a whole one, or its end for a pattern with wildcards."""
    wild = any(character in pattern for character in "*?[{")
    known = [name.rpartition(".")[2] for name in names] if wild else names
    known = list(dict.fromkeys(known[:COMPARED]))
    return next(iter(get_close_matches(pattern.strip("*."), known, 1, 0.7)), "")


def _further(recipe: Recipe, further: Collection[str]) -> Iterator[str]:
    """Layers that predict further tokens, which patterns match and do not name."""
    missed = (p for p in further if is_reached(recipe, p) and not is_reached(recipe, p, True))
    first = next(missed, "")
    if first:
        yield (
            f"{first} stays float: it predicts further tokens, and patterns reach such a layer by "
            "its number or as mtp.* only"
        )


def _float_mates(
    recipe: Recipe, groups: Mapping[str, Sequence[str]], further: Collection[str]
) -> Iterator[str]:
    """Linears that a rule reaches and that stay float beside one that they are fused with."""
    if not recipe.lenient:
        return
    left: list[str] = []
    for members in groups.values():
        reached = [path for path in members if is_reached(recipe, path, path in further)]
        left += reached if len(reached) < len(members) else []
    if left:
        first, others = left[0], len(left) - 1
        more = f" and {others} more" if others else ""
        verb = "stay" if others else "stays"
        yield f"{first}{more} {verb} float, too: runtimes fuse it with a linear that does"
