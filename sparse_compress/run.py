"""From a float checkpoint to a W8A8SC checkpoint: prune, quantize, slice, compress, write."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ms_quant.blocks import Steps
from ms_quant.checkpoint.finish import OutputDirectory
from ms_quant.checkpoint.job import JobDirectory
from ms_quant.pipeline import complete
from sparse_compress.fp16 import survey
from sparse_compress.info import summary
from sparse_compress.pack import Packer
from sparse_compress.prune import pruning_transform
from sparse_compress.request import Request, SparseOptions, check
from sparse_compress.writing import Progress, write_checkpoint


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
        write_checkpoint(_without_too_long(request, job), job, output, progress)

    steps = Steps(pruning_transform(options.sparsity, options.pruning))
    finished_before = complete(request.prepared, block_progress, write, steps)
    return {
        **summary(options.output),
        "not_served_by": request.not_served_by,
        "finished_before": finished_before,
    }


def _without_too_long(request: Request, job: JobDirectory) -> Request:
    """The request, less the linears that code so badly that the runtimes would refuse them."""
    checkpoint, layout = request.prepared.checkpoint, request.layout
    packer, reasons = Packer(layout, checkpoint, job, request.options.workers), {}
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
