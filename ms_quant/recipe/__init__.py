"""Recipes: what is done to which linear, in our own language, msModelSlim's or Golden Stick's.

They are data: a recipe is read, translated and checked here, and nothing is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from ms_quant.errors import BadFileError, MsQuantError, UnsupportedError
from ms_quant.recipe import modelslim, modelslim_v0, native
from ms_quant.recipe.assign import LayerChoice, assign, idle_patterns, is_reached
from ms_quant.recipe.checks import checked
from ms_quant.recipe.golden_stick import from_ptq_config
from ms_quant.recipe.modelslim import from_modelslim
from ms_quant.recipe.modelslim_v0 import from_modelslim_v0
from ms_quant.recipe.native import from_native, to_native
from ms_quant.recipe.patterns import matches, unmatched
from ms_quant.recipe.records import Recipe, Rule, Step
from ms_quant.recipe.yaml_file import read_yaml

__all__ = [
    "LayerChoice",
    "Recipe",
    "Rule",
    "Step",
    "assign",
    "checked",
    "from_modelslim",
    "from_modelslim_v0",
    "from_native",
    "from_ptq_config",
    "idle_patterns",
    "is_reached",
    "load_recipe",
    "matches",
    "to_native",
    "unmatched",
]

LANGUAGES: dict[str, Callable[[Mapping[str, Any]], Recipe]] = {
    native.APIVERSION: from_native,
    modelslim_v0.APIVERSION: from_modelslim_v0,
    **dict.fromkeys(modelslim.APIVERSIONS, from_modelslim),
}
REFUSED_LANGUAGES = {
    "modelslim_convert": "it changes the types of float weights and quantizes nothing; possible "
    "is ms-quant quantize on the bfloat16 checkpoint",
}


def load_recipe(source: str | PathLike[str] | Mapping[str, Any]) -> Recipe:
    """A recipe in any of the languages, checked.

    Args:
        source: path of a YAML file, or what such a file would hold.

    Returns:
        Recipe: which linear gets which scheme, and what is done before.

    Raises:
        MsQuantError: the file is not usable, or a key is not; names both.

    Examples:
        >>> import ms_quant
        >>> rule = {"scheme": "W4A16", "options": {"group_size": 64}, "include": ["*.mlp.*"]}
        >>> recipe = ms_quant.load_recipe({"apiversion": "ms_quant_v1", "rules": [rule]})
        >>> recipe.rules[0].scheme, recipe.rules[0].include
        ('W4A16', ('*.mlp.*',))
    """
    if isinstance(source, Mapping):
        return _bounded(source)
    path = Path(source)
    document = read_yaml(path)
    try:
        return _bounded(document)
    except MsQuantError as error:
        raise BadFileError(f"{path}: {error}") from None


def _bounded(document: Mapping[str, Any]) -> Recipe:
    try:
        return _translated(document)
    except (OverflowError, RecursionError) as error:
        raise BadFileError(f"the recipe is nested or counts too far ({error})") from None


def _translated(document: Mapping[str, Any]) -> Recipe:
    language = document.get("apiversion")
    if not isinstance(language, str) or language not in LANGUAGES:
        found = repr(language)[:80] if "apiversion" in document else "missing"
        if isinstance(language, str) and language in REFUSED_LANGUAGES:
            raise UnsupportedError(
                f"apiversion {language} is not supported, {REFUSED_LANGUAGES[language]}"
            )
        raise BadFileError(f"apiversion is {found}, expected one of {', '.join(LANGUAGES)}")
    return checked(LANGUAGES[language](document))
