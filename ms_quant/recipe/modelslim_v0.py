"""Recipes of msModelSlim's older engine, ``apiversion: modelslim_v0``.

What a key does there is documented for those that are translated; the others are refused by key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ms_quant.recipe.modelslim_v0_anti import read_anti, why_not_for
from ms_quant.recipe.modelslim_v0_calib import WeightConfig, read_config
from ms_quant.recipe.patterns import escape
from ms_quant.recipe.reading import Section, refuse
from ms_quant.recipe.records import EVERYTHING, Recipe, Rule
from ms_quant.schemes.table import STATIC_CACHE

APIVERSION = "modelslim_v0"
DATASET = "teacher_qualification.jsonl"  # by default
GIB = 1 << 30
SPEC = (
    "anti_cfg",
    "anti_params",
    "calib_cfg",
    "calib_params",
    "calib_save_params",
    "batch_size",
    "anti_dataset",
    "calib_dataset",
)
CALIB_PARAMS = ("disable_level", "mix_cfg")
SAVE_PARAMS = ("part_file_size", "safetensors_name")


def from_modelslim_v0(document: Mapping[str, Any]) -> Recipe:
    """The recipe of a modelslim_v0 document.

    Raises:
        MsQuantError: something has no counterpart here, or no documented meaning; names the key.
    """
    top = Section(document, "")
    spec = Section(top.get("spec"), "spec", SPEC)
    config = read_config(_part(spec, "calib_cfg"))
    steps, notes = read_anti(spec)
    spec.integer("batch_size", 4, least=1)
    if spec.get("anti_dataset", None) not in (None, spec.get("calib_dataset", None)):
        notes.append("spec.anti_dataset: is not read, smoothing and ranges see the same windows")
    save = Section(_part(spec, "calib_save_params").value, "spec.calib_save_params", SAVE_PARAMS)
    if save.get("safetensors_name", None) is not None:
        notes.append("spec.calib_save_params.safetensors_name: files are named by their format")
    no_data = spec.get("calib_dataset", DATASET) is None
    one_file = save.get("part_file_size", None) is None
    return Recipe(
        rules=tuple(_rules(config, Section(_part(spec, "calib_params").value, *_CALIB))),
        steps=steps,
        kv_cache=STATIC_CACHE if config.caches else "",
        formats=() if config.scheme == "W4A16" else ("ascend",),
        calib=None if no_data else spec.file("calib_dataset", DATASET),
        shard_bytes=0 if one_file else save.integer("part_file_size", least=1) * GIB,
        lenient=True,
        not_for=why_not_for(spec),
        notes=(*notes, *config.notes),
    )


_CALIB = ("spec.calib_params", CALIB_PARAMS)


def _part(spec: Section, key: str) -> Section:
    """A mapping of ``spec`` that may be left out."""
    return Section(spec.get(key, None) or {}, spec.path(key))


def _rules(config: WeightConfig, params: Section) -> list[Rule]:
    """One for each kind that ``mix_cfg`` names, and one for what is left."""
    level = params.get("disable_level", "L0")
    if level != "L0":
        why = "it chooses layers by statistics whose formula is not documented"
        refuse(params.path("disable_level"), level, "L0, with calib_cfg.disable_names", why)
    mixed = Section(params.get("mix_cfg", None) or {}, params.path("mix_cfg"))
    floats = tuple(escape(name) for name in config.disabled)
    rules = []
    for pattern in sorted(mixed.value, key=_has_wildcard):  # a name goes before all patterns
        kind = mixed.one_of(pattern, config.mixed)
        glob = _glob(pattern)
        if kind == "float":
            floats += (glob,)
            continue
        scheme, algorithms = config.kind(kind, mixed.path(pattern))
        rules.append(Rule(scheme, {}, algorithms, {}, (glob,), floats, mixed.path(pattern)))
    made = config.options, config.algorithms, config.settings
    rest = Rule(config.scheme, *made, EVERYTHING, floats, "spec.calib_cfg")
    return [*rules, rest]


def _has_wildcard(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def _glob(pattern: str) -> str:
    """A pattern of ``fnmatch``, which has no brace sets and no escapes."""
    for character in "\\{}":
        pattern = pattern.replace(character, f"\\{character}")
    return pattern
