"""A job goes on where a file of its own is damaged: what the file held is made again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ms_quant.files.atomic import disk_errors
from ms_quant.files.checked_file import DamagedFileError
from ms_quant.job.directory import JobDirectory

T = TypeVar("T")
MOST_TIMES = 2
"""So often one file is made again; a disk that spoils it once more is no good."""
_LOG = logging.getLogger(__name__)


def redoing(job: JobDirectory, act: Callable[[], T], *, blocks: bool = True) -> T:
    """Does something that may find a damaged file of a job, which is open; then again without it.

    Each such file is named in a warning, one line.

    Args:
        job: the job.
        act: does what is left to do, and takes up what is finished.
        blocks: whether a damaged block is made again; hidden states are always.

    Raises:
        DamagedFileError: a file cannot be made again, or is damaged over and over.
    """
    times = Counter[Path]()
    while True:
        try:
            return act()
        except DamagedFileError as error:
            files = job.made_of(error.path) if error.path.parent == job.directory else []
            times[error.path] += 1
            hidden = error.path.name.startswith("hidden-")
            if not files or times[error.path] > MOST_TIMES or not (blocks or hidden):
                raise
            what = "it is made again" if hidden else "its block is made again"
            _LOG.warning("%s: is damaged (%s); %s", error.path, error.reason, what)
            with disk_errors(error.path, "it again"):
                for path in files:
                    path.unlink(missing_ok=True)
