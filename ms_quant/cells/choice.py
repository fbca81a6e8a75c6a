"""What each linear of a network becomes: from a scheme, a recipe or a predicate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Protocol, runtime_checkable

from mindspore import nn

from ms_quant.algorithms import PLAIN, AlgorithmPipeline, get_algorithms
from ms_quant.cells.sites import Site
from ms_quant.cells.tree import linears
from ms_quant.errors import BadArgumentError, MsQuantError
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.recipe import LayerChoice, Recipe, assign, idle_patterns, load_recipe
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.table import VALUES, get_scheme

RECIPES = (".yaml", ".yml")
FILES = (".json", ".safetensors", ".ckpt")


@runtime_checkable
class Planned(Protocol):
    """Anything that says what a linear becomes by a scheme and algorithms."""

    @property
    def scheme(self) -> Scheme: ...
    @property
    def algorithms(self) -> AlgorithmPipeline: ...


@dataclass(frozen=True)
class LinearPlan:
    """What a linear of a network becomes.

    Attributes:
        scheme: its numbers.
        algorithms: what finds them.
    """

    scheme: Scheme
    algorithms: AlgorithmPipeline


Predicate = Callable[[str, nn.Cell], "str | Planned | None"]
"""Called with the path and the Cell of each linear; gives the name of a scheme, a record with a
scheme and algorithms, or None for a linear that stays float."""
Wish = str | PathLike[str] | Recipe | Predicate


@dataclass(frozen=True)
class Common:
    """What holds for every linear whose scheme is given by its name.

    Attributes:
        algorithm: names joined with ``+``.
        options: of schemes and algorithms.
    """

    algorithm: str = DEFAULTS.algorithm
    options: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, name: str) -> LinearPlan:
        """What a scheme's name stands for.

        Raises:
            MsQuantError: a name or an option is unknown, or they do not go together.
        """
        scheme = get_scheme(name, **{k: v for k, v in self.options.items() if k in VALUES})
        settings = {key: value for key, value in self.options.items() if key not in VALUES}
        return LinearPlan(scheme, get_algorithms(self.algorithm, scheme, settings))


def is_file(wish: Wish) -> bool:
    """Whether what is wished for is what a file of quantized linears says."""
    if isinstance(wish, str):
        return wish.endswith(FILES)
    return isinstance(wish, PathLike) and not str(wish).endswith(RECIPES)


def plans_of(
    wish: Wish, network: nn.Cell, chosen: Mapping[str, Site], common: Common
) -> dict[str, LinearPlan]:
    """What each of some linears becomes, without those that stay float.

    Args:
        wish: the name of a scheme, a recipe or its path, or a predicate.
        network: the network.
        chosen: its linears.
        common: the other arguments.

    Raises:
        MsQuantError: names what of them is unknown or does not go together.
    """
    if isinstance(wish, str) and not wish.endswith(RECIPES):
        return dict.fromkeys(chosen, common.plan(wish))
    if isinstance(wish, str | PathLike | Recipe):
        if common != Common():
            named = common.algorithm != DEFAULTS.algorithm
            given = "algorithm" if named else next(iter(common.options))
            raise BadArgumentError(
                f"{given}: given with a recipe, which says all, expected it there"
            )
        recipe = wish if isinstance(wish, Recipe) else load_recipe(wish)
        return _by_recipe(recipe, chosen, [path for path, _ in linears(network)])
    if not callable(wish):
        raise BadArgumentError(
            f"scheme is {wish!r:.80}, expected the name of a scheme, a recipe, a path or a function"
        )
    found = {path: wish(path, site.cell) for path, site in chosen.items()}
    return {
        path: _planned(answer, path, common) for path, answer in found.items() if answer is not None
    }


def _planned(answer: Any, path: str, common: Common) -> LinearPlan:
    if isinstance(answer, Planned) and isinstance(answer.scheme, Scheme):
        return LinearPlan(answer.scheme, answer.algorithms)
    if not isinstance(answer, str):
        raise BadArgumentError(
            f"{path}: the predicate gives {answer!r:.80}, expected the name of a scheme, a record "
            "with a scheme and algorithms, or None"
        )
    try:
        return common.plan(answer)
    except MsQuantError as error:
        raise BadArgumentError(f"{path}: {error}") from None


_OF_CHECKPOINTS = ("kv_cache", "calib", "samples", "seq_len", "seed")


def _by_recipe(recipe: Recipe, chosen: Iterable[str], paths: list[str]) -> dict[str, LinearPlan]:
    for name in _OF_CHECKPOINTS:
        if getattr(recipe, name) not in ("", None):
            raise BadArgumentError(
                f"{name}: is for checkpoints, expected a recipe of rules and steps for a network"
            )
    for step in recipe.steps:
        if step.groups or step.by_producer:
            raise BadArgumentError(
                f"{step.where}: groups or producers of a decoder checkpoint, expected patterns of "
                "the network's own linears"
            )
    if not recipe.lenient:
        for where, pattern in idle_patterns(recipe, paths):
            shown = ", ".join(paths[:4])
            raise BadArgumentError(
                f"{where}: pattern {pattern!r} matches no linear, expected one of: {shown}, ..."
            )
    found = assign(recipe, dict.fromkeys(chosen, ""))
    return {path: _linear_plan(choice) for path, choice in found.items()}


def _linear_plan(choice: LayerChoice) -> LinearPlan:
    scheme = get_scheme(choice.scheme, **choice.options)
    algorithm = "+".join(choice.algorithms) or PLAIN
    return LinearPlan(scheme, get_algorithms(algorithm, scheme, choice.algorithm_options))
