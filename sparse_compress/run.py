"""From a float checkpoint to W8A8SC rank directories: prune, quantize, slice, compress, write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ms_quant.checkpoint.atomic import FileRecord, disk_errors, write_json
from ms_quant.checkpoint.finish import OutputDirectory
from ms_quant.checkpoint.job import JobDirectory
from ms_quant.checkpoint.safetensors_file import open_file
from ms_quant.checkpoint.writer import TensorPlan, write_file
from ms_quant.pipeline import complete
from sparse_compress import layouts
from sparse_compress.fp16 import survey
from sparse_compress.info import summary
from sparse_compress.pack import Arrays, Packer
from sparse_compress.proof import write_proof
from sparse_compress.prune import pruning_transform
from sparse_compress.request import Request, SparseOptions, check

Progress = Callable[[str, float], None]
"""Called with the step's name and how much of it is done, 0 to 1."""


def run(
    options: SparseOptions,
    progress: Progress = lambda step, part: None,
    request: Request | None = None,
) -> dict[str, Any]:
    """Makes a W8A8SC checkpoint, or goes on making it.

    Args:
        options: what to make.
        progress: told how far the steps ``"quantize"`` and ``"compress"`` are.
        request: what :func:`~sparse_compress.request.check` made of the options, where the caller
            has it already.

    Returns:
        What was made, as JSON: see :func:`sparse_compress.info.summary`; ``"not_served_by"``,
        sentences about runtimes that cannot load it; and ``"finished_before"``, True when there
        was nothing left to do.

    Raises:
        MsQuantError: the request cannot be served; no output directory is left behind.
    """
    request = request or check(options)
    blocks = request.layout.config.num_layers

    def block_progress(index: int, part: float) -> None:
        progress("quantize", (index + part) / blocks)

    def write(job: JobDirectory, output: OutputDirectory) -> None:
        _write(_without_too_long(request, job), job, output, progress)

    transform = pruning_transform(options.sparsity, options.pruning)
    finished_before = complete(request.prepared, block_progress, write, transform)
    return {
        **summary(options.output),
        "not_served_by": request.not_served_by,
        "finished_before": finished_before,
    }


def _without_too_long(request: Request, job: JobDirectory) -> Request:
    """The request, less the linears that code so badly that the runtimes would refuse them."""
    checkpoint, layout = request.prepared.checkpoint, request.layout
    packer, reasons = Packer(layout, checkpoint, job), {}
    for index, group, fused in layout.linears():
        if fused in layout.compressed:
            found = (packer.too_long(rank, index, group) for rank in range(layout.tp))
            reason = next(filter(None, found), None)
            if reason:
                reasons[fused] = reason
    if not reasons:
        return request
    layout = replace(layout, compressed=layout.compressed - set(reasons))
    names = set(layout.float_names()) - set(request.layout.float_names())
    return replace(
        request,
        layout=layout,
        uncompressed={**request.uncompressed, **reasons},
        lost={**request.lost, **survey(checkpoint, sorted(names))},
    )


def _write(
    request: Request, job: JobDirectory, output: OutputDirectory, progress: Progress
) -> None:
    layout, directory = request.layout, output.partial
    names = ["proof", *map(layouts.rank_name, range(layout.tp))]
    with disk_errors(directory, "the rank directories"):
        for name in names:
            (directory / name).mkdir(exist_ok=True)
    files = [
        *_write_blocks(request, job, output, progress),
        write_json(directory / "config.json", layouts.model_config(layout.config)),
        _write_description(request, directory),
    ]
    facts = {
        "chosen": {f"block {i}": job.notes(i) for i in range(layout.config.num_layers)},
        "uncompressed": request.uncompressed,
        "float16_lost": request.lost,
    }
    output.finish(files, request.options.model, facts)


def _write_blocks(
    request: Request, job: JobDirectory, output: OutputDirectory, progress: Progress
) -> list[FileRecord]:
    layout, options, files = request.layout, request.options, []
    packer = Packer(layout, request.prepared.checkpoint, job)
    steps = layout.config.num_layers * (layout.tp + 1) + layout.tp

    def once(name: str, write: Callable[..., FileRecord], *arguments: int) -> None:
        files.append(output.write_once(name, partial(write, *arguments)))
        progress("compress", len(files) / steps)

    def proof(index: int, path: Path) -> FileRecord:
        source, how = packer.checkpoint, (options.sparsity, options.pruning)
        return write_proof(path, layout, index, job, source, *how)

    def block(rank: int, index: int, path: Path) -> FileRecord:
        return _write_arrays(path, packer.block(rank, index))

    def rest(rank: int, path: Path) -> FileRecord:
        tensors = packer.rest(rank)
        plans = [plan for plan, _ in tensors.values()]
        return write_file(path, plans, lambda name: tensors[name][1]())

    for index in range(layout.config.num_layers):
        once(layouts.proof_file(index), proof, index)
        for rank in range(layout.tp):
            once(layouts.rank_files(layout.config, rank)[index], block, rank, index)
    for rank in range(layout.tp):
        once(layouts.rank_files(layout.config, rank)[-1], rest, rank)
    return files


def _write_arrays(path: Path, tensors: Arrays) -> FileRecord:
    plans = [TensorPlan(name, array.dtype, array.shape) for name, array in tensors.items()]
    return write_file(path, plans, tensors.__getitem__)


def _write_description(request: Request, directory: Path) -> FileRecord:
    layout = request.layout
    lengths = {}
    for rank in range(layout.tp):
        for name in layouts.rank_files(layout.config, rank):
            tensors = open_file(directory / name).tensors
            lengths.update({(rank, key): info.shape[0] for key, info in tensors.items()})
    value = layouts.description(layout, lambda rank, name: lengths[rank, name])
    return write_json(directory / layouts.DESCRIPTION, value)
