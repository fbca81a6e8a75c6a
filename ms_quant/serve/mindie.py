"""The rules of MindIE: of MindIE-SD's ``quantize`` for the files that it reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ms_quant.serve.flat import loaded_rows, open_flat
from ms_quant.serve.records import Served, ServeRequest

WIDEST_MODE = 0o640
MAX_PATH = 4096


def check(request: ServeRequest) -> Served:
    """What the runtime will do with a checkpoint."""
    structure, served = open_flat(request, ("mindie-sd",))
    if structure is None:
        return served
    plan = structure.plan
    description = request.checkpoint / structure.flavour.document(plan)
    if request.tp != 1:
        served.problems.append(
            f"{request.checkpoint}: is one file for all, tp is {request.tp}, expected --tp 1: "
            "MindIE-SD reads a file for each rank, which a checkpoint of ms-quant is not split into"
        )
    served.problems += _access_problems([description, *structure.checkpoint.files()])
    if not served.problems:
        served.loaded = loaded_rows(structure, 1)
        served.notes.append(
            "MindIE-SD is called from Python on a network that is already built; MindIE-LLM's "
            "names of packed tensors are not documented, so nothing is written for it"
        )
        dtype = f"torch.{plan.config.dtype}"
        served.command = [f"quantize(model, {str(description)!r}, dtype={dtype})"]
    return served


def _access_problems(files: list[Path]) -> Iterator[str]:
    """What the runtime's own check of every file refuses."""
    for path in files:
        mode = path.stat().st_mode & 0o777
        if path.is_symlink():
            yield f"{path}: is a symbolic link, expected a file: MindIE-SD refuses links"
        elif mode & ~WIDEST_MODE:
            yield (
                f"{path}: has mode {mode:o}, expected at most {WIDEST_MODE:o}: MindIE-SD refuses "
                f"wider ones (chmod {WIDEST_MODE:o})"
            )
        if len(str(path.absolute())) > MAX_PATH:
            yield f"{path}: a path of more than {MAX_PATH} characters, which MindIE-SD refuses"
