"""From a float checkpoint to a quantized one: validate, work block by block, write."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from ms_quant.errors import MsQuantError
from ms_quant.files.atomic import DiskError
from ms_quant.files.first_pass import read_source
from ms_quant.files.reader import ChangedSourceError
from ms_quant.files.strict_json import read_json
from ms_quant.formats.opening import JobNumbers
from ms_quant.job.directory import JobDirectory
from ms_quant.job.output_directory import MAX_RECORD_BYTES, RECORD, OutputDirectory
from ms_quant.pipeline.request import (
    SHARD_BYTES,
    CheckedJob,
    QuantizeOptions,
    needed_bytes,
    prepare,
)
from ms_quant.pipeline.writer import output_bytes, summary, write_output
from ms_quant.quantization import activation_record as activations
from ms_quant.quantization.executor import Executor, InOrder
from ms_quant.quantization.hooks import NO_HOOKS, BlockHooks
from ms_quant.quantization.work import BlockWork, Progress
from ms_quant.statistics import activation_range
from ms_quant.statistics.activation_range import float16_facts

Reading = Callable[[float], None]
IN_ORDER = InOrder()

__all__ = [
    "CheckedJob",
    "QuantizeOptions",
    "complete",
    "needed_bytes",
    "output_bytes",
    "prepare",
    "prove_source",
    "quantize_checkpoint",
]


def quantize_checkpoint(
    options: QuantizeOptions,
    progress: Progress = lambda index, part: None,
    checked: CheckedJob | None = None,
    reading: Reading = lambda part: None,
    executor: Executor = IN_ORDER,
) -> dict[str, Any]:
    """Makes a quantized checkpoint, or goes on making it.

    Args:
        options: the request.
        progress: told how far each block is.
        checked: the checked request, where the caller has it already.
        reading: told how much of the model's first pass is done, 0 to 1.
        executor: what maps the work over the blocks.

    Returns:
        What was made, as JSON: output, scheme, bytes, quantized and float linears, and
        ``"finished_before"``, True when there was nothing left to do; of float16 also what
        :func:`~ms_quant.statistics.activation_range.float16_facts` says. Of several formats a
        list of that, under ``"formats"``.

    Raises:
        MsQuantError: the request cannot be served; no output directory is left behind.
    """
    checked = checked or prepare(options)
    finished_before = complete(checked, progress, _write, reading=reading, executor=executor)
    results = [_summary(request, finished_before) for request in checked.all]
    return {"formats": results} if checked.others else results[0]


def _summary(request: CheckedJob, finished_before: bool) -> dict[str, Any]:
    """What was made; for a runtime in float16 also how large its activations get."""
    plan, output = request.plan, request.options.output
    result = summary(plan, output, finished_before)
    if plan.dtype.name != "float16":
        return result
    path = output / RECORD
    return result | float16_facts(read_json(path, MAX_RECORD_BYTES), str(path))


def complete(
    checked: CheckedJob,
    progress: Progress,
    write: Callable[[CheckedJob, JobDirectory, OutputDirectory], None],
    hooks: BlockHooks = NO_HOOKS,
    reading: Reading = lambda part: None,
    executor: Executor = IN_ORDER,
) -> bool:
    """Does what is left of a job: blocks, output, and removing the job directory.

    Args:
        checked: the checked request.
        progress: told how far each block is.
        write: writes and finishes the output of a request whose blocks are finished.
        hooks: what is done around the algorithm.
        reading: told how much of the model's first pass is done, 0 to 1.
        executor: what maps the work over the blocks.

    Returns:
        True when every output was finished before.

    Raises:
        MsQuantError: the request cannot be served, or another process works on it.
    """
    if all(request.output().finished for request in checked.all):
        if not checked.options.keep_job:
            _remove_leftover(checked)
        return True
    job = checked.job()
    with job.open():
        # Another process may have finished an output just now.
        left = {k: r.output() for k, r in enumerate(checked.all) if not r.output().finished}
        if left:
            prove_source(checked, job, reading)
        with ExitStack() as opened:
            for output in left.values():
                opened.enter_context(output.open())
            if left:
                run_blocks(checked, job, progress, hooks, executor)
            for target, output in left.items():
                write(checked.all[target], checked.job(target), output)
        if not checked.options.keep_job:
            job.remove()
    return not left


def prove_source(checked: CheckedJob, job: JobDirectory, reading: Reading) -> None:
    """Reads all of the float model once, in a job that is open; a second call does nothing.

    Raises:
        MsQuantError: a tensor holds NaN or infinity, or is not what the job has read before.
            Where no block was finished, no job is left behind.
    """
    if checked.checkpoint.digests:
        return
    try:
        found = read_source(checked.checkpoint, job.directory, reading)
    except (DiskError, ChangedSourceError):
        raise
    except MsQuantError:
        if not job.finished():
            job.remove()
        raise
    for request in checked.all:
        request.checkpoint.expect(found.digests, found.trusted, found.stamps)


def _remove_leftover(checked: CheckedJob) -> None:
    """Deletes the job directory that a kill at the very end left; any other is not ours."""
    if checked.options.job_directory.is_dir():
        with suppress(MsQuantError):
            job = checked.job()
            with job.open():
                job.remove()


def run_blocks(
    checked: CheckedJob,
    job: JobDirectory,
    progress: Progress,
    hooks: BlockHooks = NO_HOOKS,
    executor: Executor = IN_ORDER,
) -> None:
    """Finishes every block of a job."""
    targets = [(checked.plan, job)]
    for target, request in enumerate(checked.others, 1):
        targets.append((request.plan, checked.job(target)))
    work = BlockWork(targets, checked.tensors, checked.tokens, progress, hooks)
    executor.run(work)


def _write(checked: CheckedJob, job: JobDirectory, output: OutputDirectory) -> None:
    plan, options = checked.plan, checked.options
    facts: dict[str, Any] = {
        "chosen": {f"block {i}": job.notes(i) for i in range(plan.config.num_layers)}
    }
    if checked.tokens is not None:
        facts[activations.KEY] = activations.activation_facts(plan, job.statistic)
        facts[activation_range.KEY] = job.ranges()
    numbers = JobNumbers(plan, job, checked.tensors)
    size = options.shard_bytes or SHARD_BYTES
    write_output(plan, numbers, output, size, options.model, facts)
