"""What a checkpoint says it was made with, and the layout that follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ms_quant.errors import MsQuantError
from ms_quant.files.strict_json import read_json
from ms_quant.job.output_directory import MAX_RECORD_BYTES, RECORD
from ms_quant.models.config import ModelConfig
from ms_quant.pipeline.planning import make_plan
from sparse_compress.codec.fractal import TILE_ROWS
from sparse_compress.layouts import MAX_RANKS, Layout, get_target
from sparse_compress.layouts.fp16 import FLOAT16
from sparse_compress.layouts.limits import outside_limits
from sparse_compress.layouts.partition import check_tp, fused_shape
from sparse_compress.rate.prune import Pruning, check_pruning

MAX_PATTERNS = 1000  # each is compared with every linear


def read_record(directory: Path) -> dict[str, Any]:
    """The record of a W8A8SC checkpoint, with every entry that verification uses checked.

    Raises:
        MsQuantError: there is none, or an entry is missing or has a wrong type or value.
    """
    path = directory / RECORD
    record = read_json(path, MAX_RECORD_BYTES).get("record")
    if not isinstance(record, dict) or record.get("format") != "W8A8SC":
        raise MsQuantError(f"{path}: is no record of a W8A8SC checkpoint")
    kinds = {
        "target": str,
        "tp": int,
        **({"rate": dict} if "rate" in record else {"sparsity": float, "pruning": str}),
        "algorithm": str,
        "exclude": list,
    }
    for key, kind in kinds.items():
        if type(record.get(key)) is not kind:
            raise MsQuantError(
                f"{path}: {key} is {record.get(key)!r:.80}, expected {kind.__name__}"
            )
    if not 1 <= record["tp"] <= MAX_RANKS:
        raise MsQuantError(f"{path}: tp is {record['tp']}, expected 1 to {MAX_RANKS}")
    if len(record["exclude"]) > MAX_PATTERNS:
        raise MsQuantError(
            f"{path}: exclude has {len(record['exclude'])} patterns, expected at most "
            f"{MAX_PATTERNS}"
        )
    if not all(isinstance(pattern, str) for pattern in record["exclude"]):
        raise MsQuantError(f"{path}: exclude is {record['exclude']!r:.80}, expected patterns")
    if "rate" not in record:
        check_pruning(record["sparsity"], record["pruning"])
    return record


def recorded_pruning(record: dict[str, Any]) -> Pruning | None:
    """How the weights were pruned, or None where they were rounded for a goal."""
    return None if "rate" in record else Pruning(record["sparsity"], record["pruning"])


def recorded_layout(directory: Path, config: ModelConfig, record: dict[str, Any]) -> Layout:
    """The layout that a checkpoint should have, by the arguments it was made with.

    Args:
        directory: the checkpoint.
        config: its model.
        record: what it was made with.

    Raises:
        MsQuantError: the arguments do not fit the model, or a linear is compressed or not for no
            valid reason.
    """
    path = directory / RECORD
    stated = read_json(path, MAX_RECORD_BYTES).get("uncompressed")
    if not isinstance(stated, dict):
        raise MsQuantError(f"{path}: uncompressed is {stated!r:.80}, expected reasons by name")
    target, tp = get_target(record["target"], config.model_type), record["tp"]
    check_tp(config, tp)
    target.check(config, tp, record["algorithm"])
    plan = make_plan(config, "W8A8", record["algorithm"], dtype=FLOAT16, exclude=record["exclude"])
    limits = outside_limits(target, config, tp)
    compressed = set()
    for index, group, fused in target.linears(config):
        planned = group.name in {found.name for found in plan.groups(index)}
        asked = planned and fused not in limits
        if planned and not asked and fused not in stated:
            raise MsQuantError(f"{directory}: {fused}: {limits[fused]}")
        partial = fused_shape(group, tp)[0] % TILE_ROWS  # may code too badly to be stored
        if (fused in stated) == asked and not (asked and partial):
            expected = "compressed" if asked else "uncompressed"
            raise MsQuantError(f"{path}: {fused} is not {expected}, expected it by the arguments")
        if asked and fused not in stated:
            compressed.add(fused)
    return Layout(config, tp, frozenset(compressed), target)
