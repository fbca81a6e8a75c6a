"""``anti_cfg`` of modelslim_v0: what smooths inputs before anything is rounded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ms_quant.recipe.modelslim_processors import SUBGRAPHS
from ms_quant.recipe.patterns import escape
from ms_quant.recipe.reading import Section, refuse
from ms_quant.recipe.records import Step

KEYS = ("anti_method", "w_bit", "a_bit", "w_sym", "disable_anti_names", "flex_config", "dev_id")
METHODS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "m1": ("smoothquant", {"alpha": 0.5}, ("norm-linear",)),
    "m4": ("smoothquant", {"alpha": 0.9}, ("up-down", "ov", "norm-linear")),
    "m6": ("flexsmooth", {}, ("up-down", "ov", "norm-linear")),
}
"""Method to our algorithm, its options and the subgraphs that it smooths."""
REFUSED = {
    "m2": "the thresholds of its outlier suppression are not documented; possible are m1, m4, m6",
    "m3": "its search is not documented; possible is awq of modelslim_v1",
    "m5": "its search is not documented; possible are m1, m4, m6",
}
DEFAULT = "m2"
SHIFTED = ("qwen3", "qwen3_moe")
"""Model types for which ``m4`` takes alpha 0.5 and also shifts the inputs of norms."""


def why_not_for(spec: Section) -> dict[str, str]:
    """The model types that the smoothing of a ``spec`` is refused for, each with the reason."""
    anti = spec.get("anti_cfg", None)
    if anti is None or anti.get("anti_method") != "m4":
        return {}
    why = (
        "spec.anti_cfg.anti_method m4 shifts inputs of this family, and no shift is held here, "
        "expected a modelslim_v1 recipe with iter_smooth"
    )
    return dict.fromkeys(SHIFTED, why)


def read_anti(spec: Section) -> tuple[tuple[Step, ...], list[str]]:
    """The smoothing of a ``spec``, and notes.

    Raises:
        MsQuantError: it has no counterpart here; names the key.
    """
    if spec.get("anti_cfg", None) is None:
        return (), []
    section = Section(spec.get("anti_cfg"), spec.path("anti_cfg"), KEYS)
    params = Section(spec.get("anti_params", None) or {}, "spec.anti_params", ("norm_class_name",))
    method = section.get("anti_method", DEFAULT)
    if isinstance(method, str) and method in REFUSED:
        refuse(section.path("anti_method"), method, f"one of {', '.join(METHODS)}", REFUSED[method])
    algorithm, options, kinds = METHODS[section.one_of("anti_method", METHODS, DEFAULT)]
    section.one_of("w_bit", (8, 4), 8)
    section.one_of("a_bit", (8,), 8)
    section.one_of("w_sym", (True,), True)
    names, notes = section.texts("disable_anti_names", ()), []
    if names and method == "m1":
        names = ()
        notes.append(f"{section.path('disable_anti_names')}: m1 there smooths these linears, too")
    if "norm_class_name" in params:
        notes.append("spec.anti_params.norm_class_name: the family says what the norms are")
    if method == "m6":
        options = _strengths(section)
    groups = tuple(group for kind in kinds for group in SUBGRAPHS[kind])
    excluded = tuple(dict.fromkeys(map(escape, names)))
    step = Step(algorithm, options, exclude=excluded, groups=groups, where=section.where)
    return (replace(step, together=bool(excluded)),), notes


def _strengths(section: Section) -> dict[str, Any]:
    """Of ``flex_config``; what is not given is searched."""
    path = section.path("flex_config")
    flex = Section(section.get("flex_config", None) or {}, path, ("alpha", "beta"))
    found = {key: flex.number(key) for key in ("alpha", "beta") if flex.get(key, None) is not None}
    for key, value in found.items():
        if not 0 <= value <= 1:
            refuse(flex.path(key), value, "a number from 0 to 1")
    return found
