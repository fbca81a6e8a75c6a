"""Where a job reads and writes: directories apart from each other, with room for what comes."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from pathlib import Path

from ms_quant.errors import BadArgumentError
from ms_quant.files.atomic import free_spaces_check
from ms_quant.files.hub_cache import refuse_cached_place
from ms_quant.formats.registry import FORMATS
from ms_quant.job.directory import JobDirectory
from ms_quant.job.output_directory import OutputDirectory
from ms_quant.models.block_spec import LinearGroup, LinearSpec
from ms_quant.plan.folding import changed_floats, quantized_readers
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan

IN_PROGRESS = "output in progress"
BLOCK_OVERHEAD = 1 << 14  # header and norms of a finished block's file


def check_paths(model: Path, output: Path, job: Path) -> None:
    """Refuses directories that are one another or lie in one another.

    Args:
        model: directory of the float checkpoint.
        output: directory to make.
        job: job directory.

    Raises:
        MsQuantError: names the two.
    """
    check_output_path(model, output)
    refuse_cached_place(job, "job")
    for place, what in ((model, "model"), (output, "output"), (_partial(output), IN_PROGRESS)):
        _check_apart(job, "job", place, what)


def check_output_path(model: Path, output: Path) -> None:
    """Refuses an output that is or overlaps what it is made from.

    Args:
        model: directory to read.
        output: directory to make.

    Raises:
        MsQuantError: names the two.
    """
    refuse_cached_place(output)
    for place, what in ((output, "output"), (_partial(output), IN_PROGRESS)):
        _check_apart(place, what, model, "model")


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _check_apart(place: Path, what: str, other: Path, other_what: str) -> None:
    first, second = place.resolve(), other.resolve()
    if first.is_relative_to(second):
        relation = "is" if first == second else "lies in"
    elif second.is_relative_to(first):
        relation = "contains"
    else:
        return
    raise BadArgumentError(
        f"{place}: the {what} directory {relation} the {other_what} directory {other}, expected "
        "one apart from it"
    )


def job_bytes(plans: Sequence[Plan], tokens: int, finished: Container[int] = ()) -> int:
    """Disk space of a job: the blocks that are left, two sets of hidden states, and of a block with
    experts the states before them and what each gives.

    Args:
        plans: what to do, for each format.
        tokens: how many calibration tokens there are.
        finished: the blocks that are there.
    """
    config = plans[0].config
    blocks = [index for index in range(config.num_blocks) if index not in finished]
    sets = 2 if config.routing is None else 3 + config.routing.per_token
    hidden = sets * tokens * config.hidden_size * 4 if blocks else 0
    return hidden + sum(_block_bytes(plan, index) for plan in plans for index in blocks)


def _block_bytes(plan: Plan, index: int) -> int:
    block = plan.config.block(index)
    folded = [block.norms[edge.producer].size for edge in block.edges if edge.norm]
    for edge in block.edges:
        if quantized_readers(plan, index, edge):
            changed = changed_floats(plan, index, edge)[edge.norm :]  # norms are counted
            folded += [math.prod(block.tensors[name]) for name in changed]
    linears = [
        _linear_bytes(plan.layer(index, group), group, block.linears[member])
        for group in plan.groups(index)
        for member in group.members
    ]
    return BLOCK_OVERHEAD + 4 * sum(folded) + sum(linears)


def _linear_bytes(layer: LayerPlan, group: LinearGroup, spec: LinearSpec) -> int:
    """At most: codes that are not packed, an input scale, a bias, and the rest in float32."""
    stored, (out, into) = FORMATS[layer.storage.format].linear_plan(layer, group, spec), spec.shape
    rest = sum(math.prod(s) * d.itemsize for name, (d, s) in stored.items() if name != "weight")
    return out * into + 4 * (out + 2 * into) + 2 * rest


def check_space(
    plans: Sequence[Plan],
    tokens: int,
    outputs: Sequence[tuple[OutputDirectory, int]],
    job: JobDirectory,
) -> None:
    """Refuses to start or to go on with what will not fit on the file systems.

    Args:
        plans: what to do, for each format.
        tokens: how many calibration tokens there are.
        outputs: directories that are not finished and the size of each; what an interrupted run
            left there counts.
        job: the job directory; finished blocks and hidden states count.

    Raises:
        MsQuantError: too little is free, or a directory cannot be made.
    """
    working = job_bytes(plans, tokens, job.finished()) - job.hidden_bytes()
    needed = {
        output.partial: max(0, output_bytes - output.bytes_present())
        for output, output_bytes in outputs
    }
    free_spaces_check({**needed, job.directory: max(0, working)})
