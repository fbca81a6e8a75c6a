"""Writing a finished checkpoint of any format, wherever its tensors come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ms_quant.files.atomic import FileRecord, write_json
from ms_quant.files.writer import (
    Array,
    TensorPlan,
    plan_shards,
    shard_names,
    write_file,
    write_index,
)
from ms_quant.formats.checks import format_of
from ms_quant.formats.companions import model_config
from ms_quant.formats.format import Numbers
from ms_quant.job.output_directory import OutputDirectory
from ms_quant.plan.plan import Plan
from ms_quant.progress import PartProgress, silent


def write_output(
    plan: Plan,
    numbers: Numbers,
    output: OutputDirectory,
    shard_bytes: int,
    source: Path,
    facts: Mapping[str, Any],
    progress: PartProgress = silent,
) -> None:
    """Writes every file of a checkpoint and gives the directory its name.

    Args:
        plan: what it holds.
        numbers: what its tensors are made of.
        output: where; open.
        shard_bytes: largest data size of a file, of formats that have several.
        source: the directory whose tokenizer files are copied.
        facts: entries of the record.
        progress: told how much is written, 0 to 1.
    """
    format, directory = format_of(plan), output.partial
    tensors = format.tensor_plans(plan)
    if isinstance(format.weights, str):
        shards = plan_shards(tensors, shard_bytes)
        named = dict(zip(shard_names(format.weights, len(shards)), shards, strict=True))
    else:
        named = {format.weights(plan): tensors}

    done, total = 0, sum(tensor.bytes for tensor in tensors) or 1

    def make(tensor: TensorPlan) -> Array:
        nonlocal done
        done += tensor.bytes
        progress(done / total)
        return tensor.value(numbers)

    def write_shard(path: Path) -> FileRecord:
        return write_file(path, named[path.name], make, mode=format.mode)

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
    return sum(tensor.bytes for tensor in format_of(plan).tensor_plans(plan))
