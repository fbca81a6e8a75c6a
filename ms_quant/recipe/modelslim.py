"""Recipes of msModelSlim, ``apiversion: modelslim_v1``, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ms_quant.errors import MsQuantError
from ms_quant.recipe.modelslim_linear import described
from ms_quant.recipe.modelslim_processors import Part, read_part
from ms_quant.recipe.reading import Section, items, refuse
from ms_quant.recipe.records import Recipe

APIVERSION = "modelslim_v1"
FORMATS = {
    "ascendv1_saver": "ascend",
    "compressed_tensors": "compressed-tensors",
    "mindie_format_saver": "mindie-sd",
}
SPEC = ("runner", "prior", "process", "save", "dataset")
GIB = 1 << 30


def from_modelslim(document: Mapping[str, Any]) -> Recipe:
    """The recipe of a modelslim_v1 document.

    Other keys beside ``spec`` change nothing: metadata, and places for YAML anchors.

    Raises:
        MsQuantError: something has no counterpart here; names the key.
    """
    top = Section(document, "")
    spec = Section(top.get("spec"), "spec", SPEC)
    spec.one_of("runner", ("auto", "layer_wise"), "auto")
    if spec.get("prior", None):
        raise MsQuantError("spec.prior: is not supported, expected all processors in spec.process")
    values = items(spec.get("process"), "spec.process")
    parts = [read_part(value, where) for where, value in values]
    _check_order(parts)
    _check_searches(parts)
    formats, shard_bytes = _save(spec)
    recipe = Recipe(
        rules=tuple(rule for part in parts for rule in part.rules),
        steps=tuple(step for part in parts for step in part.steps),
        kv_cache=next((part.kv_cache for part in parts if part.kv_cache), ""),
        formats=formats,
        calib=None if spec.get("dataset", None) is None else spec.text("dataset"),
        shard_bytes=shard_bytes,
    )
    if not recipe.rules:
        found = [Section(value, where).get("type") for where, value in values]
        refuse("spec.process", found, "a linear_quant in it")
    return recipe


def _check_order(parts: list[Part]) -> None:
    """Refuses what prepares linears that have been rounded, or rotates what was smoothed."""
    rounded, prepared = "", ""
    for part in parts:
        for step in part.steps:
            if rounded:
                raise MsQuantError(f"{step.where}: comes after {rounded}, expected it before")
            if step.algorithm == "quarot" and prepared:
                raise MsQuantError(f"{step.where}: comes after {prepared}, expected it before")
            prepared = step.where
        rounded = part.rules[0].where if part.rules else rounded


def _check_searches(parts: list[Part]) -> None:
    """Refuses a search with other weights than those that are written: it uses them here."""
    weights = [weight for part in parts for weight in part.weights]
    for part in parts:
        for weight in weights if part.searched else ():
            assert part.searched is not None
            if part.searched.same_grid != weight.same_grid:
                raise MsQuantError(
                    f"{part.searched.where} is {described(part.searched)}, expected "
                    f"{described(weight)} as {weight.where}"
                )


def _save(spec: Section) -> tuple[tuple[str, ...], int | None]:
    """The formats and the largest data size of a file."""
    formats, sizes = [], []
    for where, value in items(spec.get("save", []), spec.path("save")):
        saver = Section(value, where, ("type", "part_file_size"))
        formats.append(FORMATS[saver.one_of("type", FORMATS)])
        if "part_file_size" in saver:
            sizes.append((saver.path("part_file_size"), saver.integer("part_file_size")))
    for where, size in sizes:
        if size != sizes[0][1]:
            refuse(where, size, f"{sizes[0][1]} as {sizes[0][0]}")
    return tuple(dict.fromkeys(formats)), sizes[0][1] * GIB if sizes else None
