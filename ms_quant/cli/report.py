"""The command that makes one page about a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ms_quant.cli.console import (
    JsonOption,
    block_progress,
    emit,
    given_directory,
    note,
    show_fields,
)
from ms_quant.errors import BadArgumentError, BadFileError
from ms_quant.pipeline.defaults import DEFAULTS

if TYPE_CHECKING:
    from ms_quant.report.results import Results


def report(
    checkpoint: Annotated[
        Path, typer.Argument(help="Directory of a checkpoint, or of a job's output.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML page to make.")],
    against: Annotated[
        Path | None,
        typer.Option(
            help="The float model: its weights and its size stand beside those of the checkpoint, "
            "and its perplexity with --text.",
            callback=given_directory,
        ),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="What ms-quant eval --json printed, of a text or of tasks."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text to measure perplexity on, now.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = DEFAULTS.seq_len,
    windows: Annotated[int | None, typer.Option(help="Use only the first windows.", min=1)] = None,
    linear: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of linears whose weights are shown. Default: some of each kind"),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Of a running job: write the page as blocks finish."),
    ] = False,
    job: Annotated[Path | None, typer.Option(help="Job directory. Default: OUTPUT.job")] = None,
    as_json: JsonOption = False,
) -> None:
    """One page about a checkpoint, or about what is finished of a job; it needs no network."""
    from ms_quant.report.page import check_page, write_page
    from ms_quant.report.report import open_against, open_facts, report_page
    from ms_quant.report.results import read_results
    from ms_quant.report.watch import is_finished
    from ms_quant.report.watch import watch as watch_job

    check_page(output, checkpoint)
    known = read_results(results or [])
    if watch and not is_finished(checkpoint):
        watch_job(checkpoint, output, job, note)
    unfinished = _unfinished(checkpoint, job)
    if unfinished is not None:
        for name, value in (("against", against), ("text", text), ("linear", linear or None)):
            if value is not None:
                raise BadArgumentError(
                    f"--{name}: the job of {checkpoint} is not finished, expected a finished "
                    "checkpoint"
                )
        facts, compared = unfinished, None
    else:
        place = given_directory(checkpoint)
        assert place is not None
        facts = open_facts(place)
        compared = None if against is None else open_against(against, facts)
        if text is not None:
            _measure(known, place, against, text, seq_len, windows)
    write_page(output, report_page(facts, known, compared, linear or ()))
    made = {"page": str(output), "bytes": output.stat().st_size, "about": str(checkpoint)}
    emit(made, as_json, show_fields)


def _unfinished(checkpoint: Path, job: Path | None) -> Any:
    """What is known of a job whose output is not there yet; None of a checkpoint."""
    from ms_quant.report.job import job_facts, job_of

    place = job_of(checkpoint, job)
    if place is None or ((checkpoint / "config.json").is_file() and place != checkpoint):
        return None
    facts = job_facts(place, checkpoint)
    if not facts.groups:
        raise BadFileError(f"{place}: no block of the job is finished, expected one at least")
    return facts


def _measure(
    results: Results,
    checkpoint: Path,
    against: Path | None,
    text: Path,
    seq_len: int,
    windows: int | None,
) -> None:
    """Adds the perplexity of a checkpoint, and how it compares with the float model."""
    from ms_quant.data.calibration import eval_windows
    from ms_quant.evaluation.comparison import Comparison
    from ms_quant.evaluation.perplexity import measure
    from ms_quant.formats.opening import open_model

    model = open_model(checkpoint)
    tokens = eval_windows(text, checkpoint, seq_len, windows, lambda said: note(f"note: {said}"))
    with block_progress("evaluating", model.config.num_layers) as progress:
        found = measure(model, tokens, progress)
    result: dict[str, Any] = {"checkpoint": str(checkpoint), **found.found.as_json()}
    if against is not None:
        other = open_model(against)
        with block_progress("evaluating reference", other.config.num_layers) as progress:
            result |= Comparison.of(found, measure(other, tokens, progress)).as_json()
    results.add(result)
