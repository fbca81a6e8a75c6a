"""Recipes of msModelSlim's newer engine, as they are: ``modelslim_v1`` and its multimodal kinds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ms_quant.errors import BadFileError
from ms_quant.recipe.modelslim_linear import described
from ms_quant.recipe.modelslim_processors import Part, read_part
from ms_quant.recipe.reading import Section, items, refuse
from ms_quant.recipe.records import Recipe

APIVERSION = "modelslim_v1"
APIVERSIONS = (APIVERSION, "multimodal_vlm_modelslim_v1", "multimodal_sd_modelslim_v1")
FORMATS = {
    "ascendv1_saver": "ascend",
    "compressed_tensors": "compressed-tensors",
    "mindie_format_saver": "mindie-sd",
}
DATASET = "mix_calib.jsonl"  # by default
RUNNERS = ("auto", "layer_wise", "model_wise", "dp_layer_wise")
SPEC = ("runner", "prior", "process", "save", "dataset")
UNREAD = {
    "default_text": "is for images, and only text is read here",
    "multimodal_sd_config": "is for running a diffusion pipeline, and none is run here",
}
"""Keys of ``spec`` that change nothing here, and why."""
GIB = 1 << 30
STAGE_ONE = ("steps", "quant_dtype", "layer_type", "block_size", "max_samples")
"""Keys of ``adapt_rotation`` that prepare its second stage."""


def from_modelslim(document: Mapping[str, Any]) -> Recipe:
    """The recipe of a modelslim_v1 document, or of a multimodal one: the same processors.

    Other keys beside ``spec`` change nothing: metadata, and places for YAML anchors.

    Raises:
        MsQuantError: something has no counterpart here; names the key.
    """
    top = Section(document, "")
    spec = Section(top.get("spec"), "spec", (*SPEC, *UNREAD))
    runner = spec.one_of("runner", RUNNERS, "auto")
    values = items(spec.get("process"), "spec.process")
    parts = [read_part(value, where) for where, value in values]
    _check_order(parts)
    _check_searches(parts)
    formats, size = _save(spec)
    rules = tuple(rule for part in parts for rule in part.rules)
    if not rules:
        found = [Section(value, where).get("type") for where, value in values]
        refuse("spec.process", found, "a linear_quant in it")
    notes = [note for part in parts for note in part.notes]
    notes += [f"spec.{key} {why}" for key, why in UNREAD.items() if key in spec]
    if runner not in ("auto", "layer_wise"):
        notes.append(f"spec.runner: {runner} is how msModelSlim works; here it is block by block")
    return Recipe(
        rules=rules,
        steps=tuple(step for part in parts for step in part.steps),
        kv_cache=next((part.kv_cache for part in parts if part.kv_cache), ""),
        kv_cache_exclude=tuple(p for part in parts for p in part.kv_cache_exclude),
        formats=formats,
        calib=spec.file("dataset", DATASET),
        shard_bytes=size,
        lenient=True,
        not_for={name: why for part in parts for name, why in part.not_for.items()},
        notes=(*_prior(spec), *notes),
    )


def _prior(spec: Section) -> Iterable[str]:
    """Notes on the stages that prepare something for ``adapt_rotation`` of ``spec.process``.

    There is none in it: it is refused where it is.
    """
    for where, value in items(spec.get("prior", None) or [], spec.path("prior")):
        stage = Section(value, where, ("process", "dataset"))
        for place, processor in items(stage.get("process", []), stage.path("process")):
            prepares = Section(processor, place, ("type", "stage", *STAGE_ONE))
            prepares.one_of("type", ("adapt_rotation",), why="a stage before may only prepare")
            prepares.one_of("stage", (1,))
        yield f"{where}: prepares for adapt_rotation, which spec.process does not have"


def _check_order(parts: list[Part]) -> None:
    """Refuses what prepares linears that have been rounded, or rotates what was smoothed."""
    rounded, checked = "", ""
    for part in parts:
        for step in part.steps:
            if rounded:
                raise BadFileError(f"{step.where}: comes after {rounded}, expected it before")
            if step.algorithm == "quarot" and checked:
                raise BadFileError(f"{step.where}: comes after {checked}, expected it before")
            checked = step.where
        rounded = part.rules[0].where if part.rules else rounded


def _check_searches(parts: list[Part]) -> None:
    """Refuses a search with other weights than those that are written: it uses them here."""
    weights = [weight for part in parts for weight in part.weights]
    for part in parts:
        searched = part.searched
        if searched is None or not weights:
            continue
        others = [weight for weight in weights if weight.same_grid != searched.same_grid]
        if others and (part.searches_all or len(others) == len(weights)):
            raise BadFileError(
                f"{searched.where} is {described(searched)}, expected {described(others[0])} as "
                f"{others[0].where}"
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
