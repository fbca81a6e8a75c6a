"""From a float checkpoint to a W8A8SC checkpoint: prune or round for a goal, slice, code, write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ms_quant.files.strict_json import read_json
from ms_quant.job.directory import JobDirectory
from ms_quant.job.output_directory import MAX_RECORD_BYTES, RECORD, OutputDirectory
from ms_quant.pipeline.run import CheckedJob, complete
from ms_quant.quantization.hooks import BlockHooks
from ms_quant.progress import BlockProgress
from sparse_compress.layouts.fp16 import survey
from sparse_compress.pipeline.request import Request, SparseOptions, check
from sparse_compress.pipeline.writer import Progress, write_checkpoint
from sparse_compress.ranks.pack import Packer
from sparse_compress.ranks.summary import summary
from sparse_compress.rate.prune import pruning_transform


def run(
    options: SparseOptions,
    progress: Progress = lambda step, part: None,
    request: Request | None = None,
) -> dict[str, Any]:
    """Makes a W8A8SC checkpoint, or goes on making it.

    Args:
        options: what to make.
        progress: told how far the steps ``"read"``, ``"quantize"`` and ``"compress"`` are; for a
            goal also ``"measure"`` and ``"evaluate"``.
        request: what :func:`~sparse_compress.pipeline.request.check` made of the options, where the
            caller has it already.

    Returns:
        What was made, as JSON: see :func:`sparse_compress.ranks.summary.summary`;
        ``"not_served_by"``, sentences about runtimes that cannot load it; and
        ``"finished_before"``, True when there was nothing left to do.

    Raises:
        MsQuantError: the request cannot be served; no output directory is left behind.
    """
    request = request or check(options)
    blocks = request.layout.config.num_layers

    def block_progress(index: int, part: float) -> None:
        progress("quantize", (index + part) / blocks)

    if options.pruned:
        hooks = BlockHooks(pruning_transform(*options.pruned))
        finished_before = complete(
            request.checked,
            block_progress,
            _writer(request, progress),
            hooks,
            partial(progress, "read"),
        )
    else:
        finished_before = _run_for_goal(request, block_progress, progress)
    return {
        **summary(options.output),
        "not_served_by": request.not_served_by,
        "finished_before": finished_before,
    }


def _run_for_goal(request: Request, block_progress: BlockProgress, progress: Progress) -> bool:
    """Searches the price for the goal, and makes the checkpoint of that price."""
    from sparse_compress.rate.search import Search, at_price, remove_measured

    assert request.goal is not None
    checked = request.checked
    finished = checked.output().finished
    if finished:
        checked = at_price(checked, _recorded_price(request.options.output))
        complete(checked, block_progress, _writer(request, progress))
    else:
        found = Search(checked, request.goal, progress).find()
        request = replace(request, rate=found.facts)
        complete(found.checked, block_progress, _writer(request, progress), found.hooks)
    if not request.options.keep_job:
        remove_measured(request.checked)
    return finished


def _recorded_price(output: Path) -> float:
    """The price that a finished output was made with."""
    found = read_json(output / RECORD, MAX_RECORD_BYTES).get("rate")
    price = found.get("price") if isinstance(found, dict) else None
    return price if isinstance(price, float) else 0.0


def _writer(
    request: Request, progress: Progress
) -> Callable[[CheckedJob, JobDirectory, OutputDirectory], None]:
    def write(checked: CheckedJob, job: JobDirectory, output: OutputDirectory) -> None:
        write_checkpoint(_without_too_long(request, job), job, output, progress)

    return write


def _without_too_long(request: Request, job: JobDirectory) -> Request:
    """The request, less the linears that code so badly that the runtimes would refuse them."""
    checkpoint, layout = request.checked.checkpoint, request.layout
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
