"""The commands that look at a finished checkpoint or convert it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ms_quant.cli.arguments import CheckpointArgument, MadeArgument
from ms_quant.cli.console import (
    JsonOption,
    emit,
    exit_if_problems,
    given_directory,
    human_bytes,
    naming_leftovers,
    note,
    show_fields,
    step_progress,
    wide_table,
)
from ms_quant.diffusers.directory import is_diffusers


def convert(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")],
    format: Annotated[
        str,
        typer.Option(
            help="The other format, see [b]ms-quant schemes[/b]; float: an FP8 or int4 model in "
            "bfloat16."
        ),
    ],
    shard_bytes: Annotated[
        int | None, typer.Option(help="Largest output file. Default: as it was made", min=1)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The same numbers in another format, or why it cannot hold them."""
    from ms_quant.pipeline.convert import convert_checkpoint

    with naming_leftovers(output), step_progress() as step:
        result = convert_checkpoint(
            checkpoint,
            output,
            format,
            shard_bytes=shard_bytes,
            progress=lambda part: step("converting", part),
        )
    for line in result.not_served_by:
        note(f"note: {line}")
    emit(result.as_json(), as_json, show_fields)


def verify(
    checkpoint: MadeArgument,
    source: Annotated[
        Path | None,
        typer.Option(help="The float checkpoint it was made from.", callback=given_directory),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove a quantized checkpoint: names, types, shapes, description, scales, hashes."""
    if is_diffusers(checkpoint):
        from ms_quant.diffusers.verify import verify_directory

        result = verify_directory(checkpoint, source)
    else:
        from ms_quant.verify.checkpoint import verify_checkpoint

        result = verify_checkpoint(checkpoint, source)
    emit(result.as_json(), as_json, _show_verification)
    exit_if_problems(result.problems)


def serve_check(
    checkpoint: MadeArgument,
    runtime: Annotated[
        str, typer.Option(help="vllm-mindspore, vllm-ascend, mindie, vllm, vllm-omni or mindie-sd.")
    ],
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.", min=1)] = 1,
    device: Annotated[
        str, typer.Option(help="310p or 910b. Default: what such checkpoints are made for")
    ] = "",
    attention: Annotated[
        Path | None,
        typer.Option(help="What attention becomes: written by recommend(...).save(FILE)."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What a runtime would load how, and the command that serves it; or why it would not."""
    if is_diffusers(checkpoint):
        from ms_quant.diffusers.serving import serve_check_directory as check
    else:
        from ms_quant.serve.check import serve_check as check

    result = check(checkpoint, runtime, tp, device.lower(), attention)
    emit(result, as_json, _show_serving)
    exit_if_problems(result["problems"])


def inspect(checkpoint: MadeArgument, as_json: JsonOption = False) -> None:
    """What a checkpoint holds: format, sizes, how each linear is stored."""
    if is_diffusers(checkpoint):
        from ms_quant.diffusers.inspection import inspect_directory

        found = inspect_directory(checkpoint)
    else:
        from ms_quant.formats.inspection import inspect_checkpoint

        found = inspect_checkpoint(checkpoint)
    emit(found, as_json, _show_inspection)


def _show_verification(result: dict[str, Any]) -> None:
    for problem in result["problems"]:
        print(problem)
    if result["layers"]:
        worst = max(result["layers"], key=lambda layer: layer["output_error"])
        print(
            f"{len(result['layers'])} linears compared with the source, {result['made_again']} bit "
            f"for bit; largest relative output error {worst['output_error']:.4f} at "
            f"{worst['layer']}"
        )
        if result["unknown"]:
            print(f"{len(result['unknown'])} not compared: where their smoothing went is not known")
    for text in result["notes"]:
        note(f"note: {text}")
    for text in result["not_proved"]:
        print(f"not proved: {text}")
    if not result["problems"]:
        print(
            f"{result['checkpoint']}: {result['verdict']}, {result['quantized']} quantized linears"
        )


def _show_serving(result: dict[str, Any]) -> None:
    keys = ("checkpoint", "format", "runtime", "tp", "device")
    show_fields({key: result[key] or None for key in keys})
    if result["loaded"]:
        table = wide_table("layer", "ranks", "loaded as", "weight", "layers", "size")
        table.box, table.pad_edge, table.padding = SIMPLE_HEAD, False, (0, 1)
        for row in result["loaded"]:
            cells = [row[key] for key in ("kind", "ranks", "method", "weight", "layers")]
            table.add_row(*map(str, cells), human_bytes(row["bytes"]))
        Console().print(table)
    for problem in result["problems"]:
        print(problem)
    for text in result["notes"]:
        note(f"note: {text}")
    if result["line"]:
        print(result["line"])
    if result.get("attention"):
        print(json.dumps(result["attention"]))


def _show_inspection(result: dict[str, Any]) -> None:
    linears = result.pop("linears")
    show_fields(result)
    table = Table("linear", "stored as", "shape")
    for row in linears:
        table.add_row(row["name"], row["stored_as"], " x ".join(map(str, row["shape"])))
    Console().print(table)
