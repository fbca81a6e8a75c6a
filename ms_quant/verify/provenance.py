"""Checkpoints that others made: what is known of them, and what nobody can prove without a record.

The record of a converted one has the entry ``provenance`` in place of the algorithm, the
calibration and the model that it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ms_quant.files.reader import fingerprint
from ms_quant.files.strict_json import read_json
from ms_quant.formats.structure import (
    MAX_DESCRIPTION_BYTES,
    Structure,
    is_ours,
)
from ms_quant.job.output_directory import RECORD
from ms_quant.numerics.activation import Phased, StaticInt8
from ms_quant.plan.plan import Plan

UNKNOWN = "unknown"
"""The algorithm of a record with a provenance."""
SIGNS = (
    ("compressed-tensors", "recipe.yaml", "LLM Compressor"),
    ("ascend", "*_best_practice.yaml", "msModelSlim"),
)
"""Files that a tool leaves beside what it makes: format, pattern, tool."""


def provenance(structure: Structure) -> dict[str, Any]:
    """What is known of a checkpoint without our record, as JSON."""
    directory, name = structure.checkpoint.directory, structure.format.name
    tools = [tool for format, sign, tool in SIGNS if format == name and any(directory.glob(sign))]
    found: dict[str, Any] = {"made_by": tools[0] if tools else UNKNOWN, "format": name}
    entry = structure.format.entry
    where = structure.format.find(directory)[0]
    description = read_json(where, MAX_DESCRIPTION_BYTES)
    version = (description[entry] if entry else description).get("version")
    if isinstance(version, str):
        found["version"] = version[:40]
    return {
        **found,
        "calibration": "no record",
        "source": "no record",
        "checkpoint": fingerprint(structure.checkpoint),
        **({"notes": structure.notes} if structure.notes else {}),
    }


def without_algorithms(record: Mapping[str, Any]) -> dict[str, Any]:
    """A plan's own record, of a checkpoint of which nobody knows how it was made."""
    made = {key: value for key, value in record.items() if key != "algorithm_options"}
    if "mixed" in made:
        made["mixed"] = {path: without_algorithms(way) for path, way in made["mixed"].items()}
    return made | {"algorithm": UNKNOWN}


def not_proved(directory: Path, plan: Plan, compared: bool) -> list[str]:
    """What is taken on trust of a checkpoint that others made, one clause each.

    Args:
        directory: the checkpoint.
        plan: what it holds.
        compared: whether its source was given.
    """
    found = []
    if not is_ours(directory):
        found.append(f"that files are as they were written: there is no {RECORD}")
    static = [
        path
        for path in plan.quantized()
        if isinstance(plan.quantized_layer(path).scheme.activation, StaticInt8 | Phased)
    ]
    if static:
        found.append(
            f"that the input scales of {len(static)} linears are those of calibration: there is "
            "no record of it"
        )
    found.append("which algorithm placed the codes")
    if not compared:
        found.append("that the weights are those of a source: none was given (--source)")
    return found
