"""Writing a finished checkpoint of any format, wherever its tensors come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.files.atomic import FileRecord, write_json
from ms_quant.files.writer import plan_shards, shard_names, write_file, write_index
from ms_quant.formats.companions import model_config
from ms_quant.job.output_directory import OutputDirectory
from ms_quant.plan.plan import Plan
from ms_quant.schemes.table import FLOAT_CACHE

Tensor = Callable[[str], np.ndarray | Iterator[np.ndarray]]
"""Gives a tensor of the output by its name, whole or in pieces."""


def write_output(
    plan: Plan,
    get: Tensor,
    output: OutputDirectory,
    shard_bytes: int,
    source: Path,
    facts: Mapping[str, Any],
) -> None:
    """Writes every file of a checkpoint and gives the directory its name.

    Args:
        plan: what it holds.
        get: gives its tensors.
        output: where; open.
        shard_bytes: largest data size of a file, of formats that have several.
        source: the directory whose tokenizer files are copied.
        facts: entries of the record.
    """
    format, directory = plan.format, output.partial
    tensors = format.tensor_plans(plan)
    if isinstance(format.weights, str):
        shards = plan_shards(tensors, shard_bytes)
        named = dict(zip(shard_names(format.weights, len(shards)), shards, strict=True))
    else:
        named = {format.weights(plan): tensors}

    def write_shard(path: Path) -> FileRecord:
        return write_file(path, named[path.name], get, mode=format.mode)

    files = [output.write_once(name, write_shard) for name in named]
    if isinstance(format.weights, str):
        files.append(write_index(directory, named, output_bytes(plan), format.index))
    description = format.description(plan)
    entry = {format.entry: description} if format.entry else {}
    config = {**model_config(plan.config, plan.dtype), **entry}
    files.append(write_json(directory / "config.json", config))
    if not format.entry:
        files.append(write_json(directory / format.document(plan), description, format.mode))
    output.finish(files, source, facts)


def output_bytes(plan: Plan) -> int:
    """Bytes of the tensors of a checkpoint of the plan's format."""
    return sum(tensor.bytes for tensor in plan.format.tensor_plans(plan))


def summary(plan: Plan, output: Path, finished_before: bool) -> dict[str, Any]:
    return {
        "output": str(output),
        "format": plan.format.name,
        "scheme": plan.scheme_name,
        "algorithm": plan.algorithm,
        "kv_cache": plan.kv_cache or FLOAT_CACHE,
        "dtype": plan.dtype.name,
        "tensor_bytes": output_bytes(plan),
        "quantized_linears": len(plan.quantized()),
        "float_linears": plan.float_linears(),
        "served_by": plan.served_by,
        "not_served_by": plan.not_served_by,
        "finished_before": finished_before,
    }
