"""The commands that work on directories that are quantized already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from ms_quant.cli.console import (
    JsonOption,
    emit,
    exit_if_problems,
    given_model,
    naming_leftovers,
    note,
    show_fields,
    step_progress,
)
from ms_quant.models.names import short_name
from sparse_compress.cli.arguments import DryRunOption, OutputOption, WorkersOption, note_backend
from sparse_compress.codec import CORES
from sparse_compress.layouts.msmodelslim import TARGET as MSMODELSLIM

CheckpointArgument = Annotated[
    Path, typer.Argument(help="Directory of a compressed checkpoint.", callback=given_model)
]


def compress(
    directory: Annotated[
        Path,
        typer.Argument(
            help="W8A8S or W16A16S directory as msModelSlim writes it.", callback=given_model
        ),
    ],
    output: OutputOption,
    target: Annotated[
        str, typer.Option(help="msmodelslim: any model; or, of known families, a runtime.")
    ] = MSMODELSLIM.name,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks of a runtime.", min=1)] = 1,
    workers: WorkersOption = CORES,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Code the weights of a quantized directory into UNZIP tiles.

    Started again after a kill, it goes on where it stopped.
    """
    from sparse_compress.msmodelslim.compress import check as check_directory
    from sparse_compress.msmodelslim.compress import compress as code

    with naming_leftovers(output):
        request = check_directory(directory, output, workers, target, tp)
        if dry_run:
            emit(request.plan(), as_json, show_fields)
            return
        note_backend()
        with step_progress() as progress:
            result = code(request, progress)
    for name, reason in result.summary.uncompressed.items():
        note(f"note: {name} stays as it is: {reason}")
    emit(result.as_json(), as_json, show_fields)


def decompress(
    checkpoint: CheckpointArgument,
    output: OutputOption,
    workers: WorkersOption = CORES,
    as_json: JsonOption = False,
) -> None:
    """Restore the quantized weights, bit for bit, in one directory as msModelSlim writes it.

    Started again after a kill, it goes on where it stopped.
    """
    from sparse_compress.msmodelslim.decompress import check as check_checkpoint
    from sparse_compress.msmodelslim.decompress import decompress as restore

    with naming_leftovers(output):
        request = check_checkpoint(checkpoint, output, workers)
        note_backend()
        with step_progress() as progress:
            result = restore(request, progress)
    emit(result.as_json(), as_json, show_fields)


def verify(
    checkpoint: CheckpointArgument,
    source: Annotated[
        Path | None,
        typer.Option(help="The checkpoint it was made from.", callback=given_model),
    ] = None,
    workers: WorkersOption = CORES,
    as_json: JsonOption = False,
) -> None:
    """Decode every tile and check every tensor; with the source, every weight against it.

    Pruned weights are made again, bit for bit; rounded ones are measured against the source.
    """
    from sparse_compress.verify.checkpoint import verify as prove

    note_backend()
    with step_progress() as progress:
        result = prove(checkpoint, source, progress, workers)
    emit(result.as_json(), as_json, _show_verification)
    exit_if_problems(result.problems)


def info(
    checkpoint: CheckpointArgument,
    plot: Annotated[
        Path | None,
        typer.Option(help="HTML page to make: that of ms-quant report."),
    ] = None,
    workers: WorkersOption = CORES,
    as_json: JsonOption = False,
) -> None:
    """A table of layers: shape, sparsity, size and ratio on each rank."""
    from sparse_compress.pipeline.info import info as describe

    emit(describe(checkpoint, plot, workers), as_json, _show_info)


def _show_verification(result: dict[str, Any]) -> None:
    for problem in result["problems"]:
        print(problem)
    if not result["problems"]:
        show_fields(
            {key: value for key, value in result.items() if key not in ("problems", "notes")}
        )
        print("right: every check passed")
    for text in result["notes"]:
        note(f"note: {text}")


def _show_info(result: dict[str, Any]) -> None:
    numbers = ("rank", "shape", "zeros", "raw", "stored", "ratio", "bypass")
    columns = [Column(name, justify="right", no_wrap=True) for name in numbers]
    table = Table(Column("layer", overflow="fold"), *columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in result.pop("rows"):
        table.add_row(
            short_name(row["layer"]),
            str(row["rank"]),
            "x".join(map(str, row["shape"])),
            f"{100 * row['sparsity']:.1f} %",
            f"{row['raw_bytes']:,}",
            f"{row['stored_bytes']:,}",
            f"{row['ratio']:.3f}",
            f"{row['bypass_tiles']}/{row['tiles']}",
        )
    Console().print(table)
    show_fields(result)
