"""Writing a finished checkpoint of any format, wherever its tensors come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

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
from ms_quant.models.text_part import renamed
from ms_quant.plan.plan import Plan
from ms_quant.progress import PartProgress, silent

Ending = Callable[[], FileRecord]
"""Waits until a file has its name."""


class FileWriter(Protocol):
    """Writes a file of some tensors, and tells how much of it is written."""

    def __call__(self, path: Path, tensors: Sequence[TensorPlan], told: PartProgress) -> Ending: ...


def write_output(
    plan: Plan,
    numbers: Numbers,
    output: OutputDirectory,
    shard_bytes: int,
    source: Path,
    facts: Mapping[str, Any],
    progress: PartProgress = silent,
    write: FileWriter | None = None,
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
        write: how a file is written, where not tensor by tensor in its order.
    """
    format, directory = format_of(plan), output.partial
    stored = plan.config.stored_name
    tensors = [
        replace(tensor, name=stored(tensor.name), source=tensor.source or tensor.name)
        for tensor in format.tensor_plans(plan)
    ]
    if isinstance(format.weights, str):
        shards = plan_shards(tensors, shard_bytes)
        named = dict(zip(shard_names(format.weights, len(shards)), shards, strict=True))
    else:
        named = {format.weights(plan): tensors}

    def in_order(path: Path, tensors: Sequence[TensorPlan], told: PartProgress) -> Ending:
        written, size = 0, sum(tensor.bytes for tensor in tensors) or 1

        def value(tensor: TensorPlan) -> Array:
            nonlocal written
            written += tensor.bytes
            told(written / size)
            return tensor.value(numbers)

        record = write_file(path, tensors, value, mode=format.mode)
        return lambda: record

    endings, done, total = [], 0, sum(tensor.bytes for tensor in tensors) or 1
    for name, shard in named.items():
        size = sum(tensor.bytes for tensor in shard)
        told = partial(_part, progress, done / total, size / total)
        make = partial(write or in_order, tensors=shard, told=told)
        endings.append(output.begin_once(name, make))
        done += size
        progress(done / total)
    files = [ending() for ending in endings]
    if isinstance(format.weights, str):
        files.append(write_index(directory, named, output_bytes(plan), format.index))
    description = renamed(format.description(plan), stored)
    entry = {format.entry: description} if format.entry else {}
    config = {**model_config(plan.config, plan.dtype), **entry}
    files.append(write_json(directory / "config.json", config))
    if not format.entry:
        files.append(write_json(directory / format.document(plan), description, format.mode))
    output.finish(files, source, facts)


def _part(progress: PartProgress, done: float, share: float, part: float) -> None:
    progress(done + share * part)


def output_bytes(plan: Plan) -> int:
    """Bytes of the tensors of a checkpoint of the plan's format."""
    return sum(tensor.bytes for tensor in format_of(plan).tensor_plans(plan))
