"""The directory of the work in progress: an analysis, trials, and what they measured."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ms_quant.errors import JobConflictError
from ms_quant.files.atomic import disk_errors
from ms_quant.files.lock import locked
from ms_quant.files.own import require_own_directory
from ms_quant.job.directory import LOCK
from ms_quant.mixed_precision.request import ANALYSIS, ANALYSIS_JOB
from ms_quant.mixed_precision.trials import TRIAL, TRIALS

_OURS = re.compile(
    rf"{re.escape(LOCK)}|{re.escape(ANALYSIS_JOB)}|{TRIAL}[0-9a-f]{{12}}"
    rf"|\.?({re.escape(ANALYSIS)}|{re.escape(TRIALS)})(\.\d+\.tmp)?"
)


@contextmanager
def working(directory: Path, *, keep: bool) -> Iterator[None]:
    """Makes the directory or goes on in it, and removes it when all is done.

    Args:
        directory: where it is.
        keep: leave it.

    Raises:
        MsQuantError: it holds something else, another process works there, or it cannot be
            written.
    """
    if directory.is_symlink():
        require_own_directory(directory)
    if directory.exists():
        others = [] if directory.is_dir() else [directory.name]
        if not others:
            others = sorted(p.name for p in directory.iterdir() if not _OURS.fullmatch(p.name))
        if others:
            raise JobConflictError(
                f"{directory}: holds {others[0]!r}, expected a new directory or one of this command"
            )
    with disk_errors(directory, "the job directory"):
        directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / LOCK):
        yield
        if not keep:
            with disk_errors(directory, "the job directory"):
                shutil.rmtree(directory)
