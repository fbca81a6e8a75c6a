"""Writing a quantized directory of diffusers, a linear in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from ms_quant.diffusers.component import ENTRY, INDEX
from ms_quant.diffusers.directory import CONFIG
from ms_quant.diffusers.methods import ASCEND
from ms_quant.diffusers.plan import ComponentPlan, Values
from ms_quant.diffusers.request import CheckedDiffusers, inside_path
from ms_quant.errors import BadFileError
from ms_quant.files.atomic import CHUNK_BYTES, FileRecord, atomic_file, write_json
from ms_quant.files.filling import fill
from ms_quant.files.placed_file import PlacedFile
from ms_quant.files.writer import TensorPlan, write_index
from ms_quant.formats.ascend.format import DESCRIPTION
from ms_quant.job.output_directory import OutputDirectory
from ms_quant.progress import PartProgress, silent

METADATA = {"format": "pt"}
"""What readers of diffusers' files ask of a header."""


def quantize_directory(
    checked: CheckedDiffusers, progress: PartProgress = silent
) -> dict[str, Any]:
    """Makes the output, or what is left of it.

    Args:
        checked: the checked request.
        progress: told how much is done, 0 to 1.

    Returns:
        JSON: what was made.

    Raises:
        MsQuantError: a tensor holds NaN or infinity or does not fit its type, another process
            writes the output, or the disk is full.
    """
    output = checked.output()
    if not output.finished:
        with output.open():
            _write(checked, output, progress)
    progress(1.0)
    return {**checked.as_json(), "was_finished": output.finished}


def _write(checked: CheckedDiffusers, output: OutputDirectory, progress: PartProgress) -> None:
    files, done, total = [], 0, checked.bytes or 1

    def write(name: str, size: int, make: Callable[[Path, PartProgress], FileRecord]) -> None:
        nonlocal done
        start = done

        def told(part: float) -> None:
            progress((start + part * size) / total)

        files.append(output.write_once(name, lambda path: make(path, told)))
        done += size
        progress(done / total)

    sizes = checked.source.copied_bytes()
    for name in checked.source.copied:
        write(name, sizes[name], partial(_copy, checked.source.path / name))
    for name, shards in checked.shards.items():
        plan = checked.plans[name]
        values = Values(plan)
        for shard, tensors in shards.items():
            size = sum(tensor.bytes for tensor in tensors)
            write(inside_path(name, shard), size, partial(_fill, tensors, values))
        if len(shards) > 1:
            directory = output.partial / name
            index = write_index(directory, shards, plan.bytes, INDEX)
            files.append(replace(index, name=inside_path(name, INDEX)))
        config = inside_path(name, CONFIG)
        files.append(output.write_once(config, partial(_config, plan)))
    if checked.storage.method.name == ASCEND:
        first = next(iter(checked.plans.values()))
        files.append(write_json(output.partial / DESCRIPTION, first.description()))
    output.finish(files, checked.source.path, {})


def _config(plan: ComponentPlan, path: Path) -> FileRecord:
    return write_json(path, {**plan.component.config, ENTRY: plan.entry()})


def _fill(
    tensors: Sequence[TensorPlan], values: Values, path: Path, told: PartProgress
) -> FileRecord:
    total = sum(tensor.bytes for tensor in tensors)
    file = PlacedFile(path, tensors, metadata=METADATA)
    fill(file, _parts(tensors), values, total, told)
    return file.finish()


def _parts(tensors: Sequence[TensorPlan]) -> Iterator[list[TensorPlan]]:
    """The tensors of each linear, which are made together, and each other one."""
    return (list(p) for _, p in groupby(tensors, lambda t: t.part[0] if t.part else t.name))


def _copy(source: Path, path: Path, told: PartProgress) -> FileRecord:
    """Copies a file byte for byte, or what the link in a hub's cache leads to."""
    size = source.stat().st_size or 1
    with atomic_file(path) as sink:
        try:
            with source.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    sink.write(chunk)
                    told(min(1.0, sink.bytes / size))
        except OSError as error:
            raise BadFileError(f"{source}: cannot be read ({error.strerror or error})") from error
    return sink.record()
