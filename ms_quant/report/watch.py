"""The page of a running job: written again as its blocks finish."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.job.output_directory import RECORD
from ms_quant.report.job import job_facts, job_of
from ms_quant.report.page import write_page
from ms_quant.report.report import report_page
from ms_quant.report.results import Results

EVERY = 2.0  # seconds between two looks at the job
RELOAD = 5  # seconds after which the page reads itself again
PATIENCE = 30.0  # seconds between the end of a job and its output's name


def is_finished(output: Path) -> bool:
    """Whether an output has got its name."""
    return (output / RECORD).is_file() or (output / "model_index.json").is_file()


def watch(
    output: Path,
    page: Path,
    job: Path | None,
    told: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Writes the page as blocks finish, until the output is there.

    Args:
        output: what the job makes.
        page: the HTML file.
        job: its directory; None is the usual one.
        told: is given a line each time the page was written.
        sleep: waits.

    Raises:
        MsQuantError: there is no such job, or it ended without an output.
    """
    place, seen, gone = job_of(output, job), -1, 0.0
    if place is None:
        raise BadFileError(
            f"{output}: neither it nor its job directory is there, expected a running job: start "
            f"ms-quant quantize MODEL -o {output} first"
        )
    while not is_finished(output):
        if not place.is_dir():
            gone += EVERY
            if gone > PATIENCE:
                raise BadFileError(f"{place}: the job is gone and {output} is not there")
        else:
            seen = _written(place, output, page, seen, told)
        sleep(EVERY)


def _written(job: Path, output: Path, page: Path, seen: int, told: Callable[[str], None]) -> int:
    """Writes the page where more is finished than before; says how much is."""
    try:
        facts = job_facts(job, output)
    except MsQuantError:
        if job.is_dir():
            raise
        return seen  # it ended in between
    finished = facts.finished or 0
    if finished != seen:
        write_page(page, report_page(facts, Results(), reload_seconds=RELOAD))
        told(f"{page}: {finished} of {facts.blocks or '?'} blocks")
    return finished
