"""The rules of MindIE: of MindIE-SD's ``quantize`` for the files that it reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ms_quant.formats.checks import why_not_run
from ms_quant.formats.mindie_sd.held import run_dtype
from ms_quant.formats.mindie_sd.types import MODE
from ms_quant.formats.structure import Structure
from ms_quant.serve.flat import loaded_rows, open_flat
from ms_quant.serve.records import Served, ServeRequest

MAX_PATH = 4096
MAX_DESCRIPTION, MAX_WEIGHTS = 10 << 30, 100 << 30
OLD_MXFP4 = (
    "W4A4_MXFP4 linears without a bias fail in MindIE-SD of May 2026; versions of July 2026 and "
    "later run them"
)


def check(request: ServeRequest) -> Served:
    """What the runtime will do with a checkpoint."""
    structure, served = open_flat(request, ("mindie-sd",))
    if structure is None:
        return served
    plan = structure.plan
    description = request.checkpoint / structure.format.document(plan)
    if request.tp != 1:
        served.problems.append(
            f"{request.checkpoint}: is one file for all, tp is {request.tp}, expected --tp 1: "
            "MindIE-SD reads a file for each rank, which a checkpoint of ms-quant is not split into"
        )
    served.problems += access_problems(description, MAX_DESCRIPTION)
    for path in structure.checkpoint.files():
        served.problems += access_problems(path, MAX_WEIGHTS)
    served.problems += _failing(structure)
    if not served.problems:
        served.loaded = loaded_rows(structure, 1)
        served.notes.append(
            "MindIE-SD is called from Python on a network that is already built; MindIE-LLM's "
            "names of packed tensors are not documented, so nothing is written for it"
        )
        if _has_bare_mxfp4(structure):
            served.notes.append(OLD_MXFP4)
        dtype = f"torch.{run_dtype(plan.dtype).name}"
        served.command = [f"quantize(model, {str(description)!r}, dtype={dtype})"]
    return served


def _failing(structure: Structure) -> Iterator[str]:
    """The first of the linears that the runtime fails on in each way."""
    plan, seen = structure.plan, {""}
    for index in range(plan.config.num_blocks):
        for group in plan.groups(index):
            found = why_not_run(plan, index, group)
            reason = found.partition(": ")[2]
            if reason not in seen:
                yield f"{found}; expected another scheme, another format or such linears float"
            seen.add(reason)


def _has_bare_mxfp4(structure: Structure) -> bool:
    plan = structure.plan
    return any(
        plan.layer(block.index, group).scheme.name == "W4A4_MXFP4"
        and not block.linears[member].bias
        for block in plan.config.stored_blocks
        for group in plan.groups(block.index)
        for member in group.members
    )


def access_problems(path: Path, largest: int) -> Iterator[str]:
    """What the runtime's own check of a file refuses."""
    status = path.stat()
    mode = status.st_mode & 0o777
    if path.is_symlink():
        yield f"{path}: is a symbolic link, expected a file: MindIE-SD refuses links"
    elif mode & ~MODE:
        yield (
            f"{path}: has mode {mode:o}, expected at most {MODE:o}: MindIE-SD refuses "
            f"wider ones (chmod {MODE:o})"
        )
    if os.geteuid() not in (0, status.st_uid) and status.st_gid != os.getgid():
        yield (
            f"{path}: belongs to user {status.st_uid} and group {status.st_gid}, expected this "
            "user or this group: MindIE-SD refuses the files of others"
        )
    if status.st_size > largest:
        yield (
            f"{path}: has {status.st_size} bytes, expected at most {largest}: MindIE-SD refuses "
            "larger ones"
        )
    if len(str(path.absolute())) > MAX_PATH:
        yield f"{path}: a path of more than {MAX_PATH} characters, which MindIE-SD refuses"
