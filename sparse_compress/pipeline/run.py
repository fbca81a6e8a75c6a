"""From a float checkpoint to a W8A8SC checkpoint: prune or round for a goal, slice, code, write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ms_quant.files.strict_json import read_json
from ms_quant.job.directory import JobDirectory
from ms_quant.job.output_directory import MAX_RECORD_BYTES, RECORD, OutputDirectory
from ms_quant.pipeline.run import CheckedJob, complete
from ms_quant.progress import BlockProgress, StepProgress, of_blocks, silent
from ms_quant.quantization.hooks import BlockHooks
from sparse_compress.layouts.fp16 import survey
from sparse_compress.pipeline.request import CheckedSparseJob, SparseOptions, check
from sparse_compress.pipeline.result import SparseResult
from sparse_compress.pipeline.writer import write_checkpoint
from sparse_compress.ranks.pack import Packer
from sparse_compress.ranks.summary import summary
from sparse_compress.rate.prune import pruning_transform


def run(
    options: SparseOptions,
    progress: StepProgress = silent,
    checked: CheckedSparseJob | None = None,
) -> SparseResult:
    """Makes a W8A8SC checkpoint, or goes on making it.

    Args:
        options: what to make.
        progress: told how far the steps ``"read"``, ``"quantize"`` and ``"compress"`` are; for a
            goal also ``"measure"`` and ``"evaluate"``.
        checked: what :func:`~sparse_compress.pipeline.request.check` made of the options, where the
            caller has it already.

    Raises:
        MsQuantError: it cannot be made; no output directory is left behind.
    """
    sparse = checked or check(options)
    block_progress = of_blocks(progress, "quantize", sparse.layout.config.num_layers)
    if options.pruned:
        hooks = BlockHooks(pruning_transform(*options.pruned))
        done = complete(
            sparse.quantization,
            block_progress,
            _writer(sparse, progress),
            hooks,
            partial(progress, "read"),
        )
        finished_before = done.before
    else:
        finished_before = _run_for_goal(sparse, block_progress, progress)
    return SparseResult.of(summary(options.output), tuple(sparse.not_served_by), finished_before)


def _run_for_goal(
    sparse: CheckedSparseJob, block_progress: BlockProgress, progress: StepProgress
) -> bool:
    """Searches the price for the goal, and makes the checkpoint of that price."""
    from sparse_compress.rate.search import Search, at_price, remove_measured

    assert sparse.goal is not None
    checked = sparse.quantization
    finished = checked.output().finished
    if finished:
        checked = at_price(checked, _recorded_price(sparse.options.output))
        complete(checked, block_progress, _writer(sparse, progress))
    else:
        found = Search(checked, sparse.goal, progress).find()
        sparse = replace(sparse, rate=found.facts)
        complete(found.checked, block_progress, _writer(sparse, progress), found.hooks)
    if not sparse.options.keep_job:
        remove_measured(sparse.quantization)
    return finished


def _recorded_price(output: Path) -> float:
    """The price that a finished output was made with."""
    found = read_json(output / RECORD, MAX_RECORD_BYTES).get("rate")
    price = found.get("price") if isinstance(found, dict) else None
    return price if isinstance(price, float) else 0.0


def _writer(
    sparse: CheckedSparseJob, progress: StepProgress
) -> Callable[[CheckedJob, JobDirectory, OutputDirectory], None]:
    def write(checked: CheckedJob, job: JobDirectory, output: OutputDirectory) -> None:
        write_checkpoint(_without_too_long(sparse, job), job, output, progress)

    return write


def _without_too_long(sparse: CheckedSparseJob, job: JobDirectory) -> CheckedSparseJob:
    """What was checked, less the linears that code so badly that the runtimes would refuse them."""
    checkpoint, layout = sparse.quantization.checkpoint, sparse.layout
    packer, reasons = Packer(layout, checkpoint, job, sparse.options.workers), {}
    for index, group, fused in layout.linears():
        if fused in layout.compressed:
            found = (packer.too_long(rank, index, group) for rank in range(layout.tp))
            reason = next(filter(None, found), None)
            if reason:
                reasons[fused] = reason
    if not reasons:
        return sparse
    layout = replace(layout, compressed=layout.compressed - set(reasons))
    names = set(layout.float_names()) - set(sparse.layout.float_names())
    return replace(
        sparse,
        layout=layout,
        uncompressed={**sparse.uncompressed, **reasons},
        lost={**sparse.lost, **survey(checkpoint, sorted(names))},
    )
