"""From a float checkpoint to a quantized one: validate, work block by block, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from ms_quant.budget import BUDGET, Budget
from ms_quant.errors import DiskError, MsQuantError
from ms_quant.files.first_pass import read_source
from ms_quant.files.reader import ChangedSourceError
from ms_quant.formats.opening import JobNumbers
from ms_quant.job.directory import JobDirectory
from ms_quant.job.finished import Measured
from ms_quant.job.output_directory import OutputDirectory
from ms_quant.job.redo import redoing
from ms_quant.models.names import GroupId
from ms_quant.pipeline.direct import is_direct, write_direct
from ms_quant.pipeline.measured import measured_facts
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.pipeline.request import CheckedJob, prepare
from ms_quant.pipeline.result import Result, output_of
from ms_quant.pipeline.writer import write_output
from ms_quant.progress import BlockDone, BlockProgress, PartProgress, silent
from ms_quant.quantization import activation_record as activations
from ms_quant.quantization.executor import Executor, InOrder
from ms_quant.quantization.hooks import NO_HOOKS, BlockHooks
from ms_quant.quantization.work import BlockWork
from ms_quant.statistics import activation_range

IN_ORDER = InOrder()


def run_job(
    options: QuantizeOptions,
    progress: BlockProgress = silent,
    checked: CheckedJob | None = None,
    reading: PartProgress = silent,
    executor: Executor = IN_ORDER,
    budget: Budget = BUDGET,
    finished: BlockDone = silent,
) -> Result:
    """Makes quantized checkpoints, or goes on making them.

    Args:
        options: what was asked.
        progress: told how far each block is.
        checked: what :func:`~ms_quant.pipeline.request.prepare` made of the options, where the
            caller has it already.
        reading: told how much of the model's first pass is done.
        executor: what maps the work over the blocks.
        budget: what bounds the memory of a forward.
        finished: told of each block that is finished, and the errors of its groups.

    Raises:
        MsQuantError: the request cannot be served; no output directory is left behind.
    """
    started = time.monotonic()
    checked = checked or prepare(options)
    if is_direct(checked):
        blocks = checked.plan.config.num_blocks
        before = write_direct(checked, lambda part: progress(*_block_at(part, blocks)))
        done = Completed(before, ({},))
    else:
        done = complete(
            checked,
            progress,
            _write,
            reading=reading,
            executor=executor,
            budget=budget,
            finished=finished,
        )
    outputs = tuple(
        output_of(one.plan, one.options.output, done.before, calibrated=True, measured=known)
        for one, known in zip(checked.all, done.measured, strict=True)
    )
    notes = dict.fromkeys(line for one in checked.all for line in one.notes)
    return Result(outputs, tuple(notes), time.monotonic() - started)


def _block_at(part: float, blocks: int) -> tuple[int, float]:
    """How far a whole is, as how far a block is."""
    index = min(int(part * blocks), blocks - 1)
    return index, part * blocks - index


@dataclass(frozen=True)
class Completed:
    """A job that has nothing left to do.

    Attributes:
        before: whether every output was finished before.
        measured: for each output what is known of its groups; nothing where all were finished
            before.
    """

    before: bool
    measured: tuple[Mapping[GroupId, Measured], ...]


def complete(
    checked: CheckedJob,
    progress: BlockProgress,
    write: Callable[[CheckedJob, JobDirectory, OutputDirectory], None],
    hooks: BlockHooks = NO_HOOKS,
    reading: PartProgress = silent,
    executor: Executor = IN_ORDER,
    budget: Budget = BUDGET,
    finished: BlockDone = silent,
) -> Completed:
    """Does what is left of a job: blocks, output, and removing the job directory.

    Args:
        checked: the checked request.
        progress: told how far each block is.
        write: writes and finishes the output of a request whose blocks are finished.
        hooks: what is done around the algorithm.
        reading: told how much of the model's first pass is done, 0 to 1.
        executor: what maps the work over the blocks.
        budget: what bounds the memory of a forward.
        finished: told of each block that is finished, and the errors of its groups.

    Raises:
        MsQuantError: the request cannot be served, or another process works on it.
    """
    if all(request.output().finished for request in checked.all):
        if not checked.options.keep_job:
            _remove_leftover(checked)
        return Completed(True, tuple({} for _ in checked.all))
    job = checked.job()
    with job.open():
        # Another process may have finished an output just now.
        left = {k: r.output() for k, r in enumerate(checked.all) if not r.output().finished}
        if left:
            prove_source(checked, job, reading)
        unwritten = dict(left)

        def finish() -> None:
            run_blocks(checked, job, progress, hooks, executor, budget, finished)
            for target, output in left.items():
                if target in unwritten:
                    write(checked.all[target], checked.job(target), output)
                    del unwritten[target]

        with ExitStack() as opened:
            for output in left.values():
                opened.enter_context(output.open())
            if left:
                redoing(job, finish)
        measured = tuple(checked.job(target).measured() for target in range(len(checked.all)))
        if not checked.options.keep_job:
            job.remove()
    return Completed(not left, measured)


def prove_source(checked: CheckedJob, job: JobDirectory, reading: PartProgress) -> None:
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
    progress: BlockProgress,
    hooks: BlockHooks = NO_HOOKS,
    executor: Executor = IN_ORDER,
    budget: Budget = BUDGET,
    finished: BlockDone = silent,
) -> None:
    """Finishes every block of a job."""
    targets = [(checked.plan, job)]
    for target, request in enumerate(checked.others, 1):
        targets.append((request.plan, checked.job(target)))
    work = BlockWork(
        targets,
        checked.tensors,
        checked.tokens,
        progress,
        hooks,
        budget,
        all_tokens=checked.options.all_tokens,
        done=finished,
    )

    def run() -> None:
        for _, target in targets:
            target.check_finished()
        executor.run(work)

    redoing(job, run)


def _write(checked: CheckedJob, job: JobDirectory, output: OutputDirectory) -> None:
    plan, options = checked.plan, checked.options
    facts: dict[str, Any] = {
        "chosen": {
            f"block {index}": {group.name: notes[group.name] for group in plan.groups(index)}
            for index in range(plan.config.num_blocks)
            for notes in [job.notes(index)]
        }
    }
    if checked.tokens is not None:
        facts[activations.KEY] = activations.activation_facts(plan, job.statistic)
        facts[activation_range.KEY] = job.ranges()
        routing = {f"block {index}": found for index, found in job.routing().items()}
        facts |= {"routing": routing} if routing else {}
        facts |= measured_facts(job)
    numbers = JobNumbers(plan, job, checked.tensors)
    write_output(plan, numbers, output, options.most_shard_bytes, options.model, facts)
