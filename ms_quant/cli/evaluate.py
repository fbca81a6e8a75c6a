"""The command that says how good a checkpoint is: on a text, or on a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ms_quant.cli.arguments import CacheOption, CheckpointArgument
from ms_quant.cli.console import JsonOption, given_model
from ms_quant.errors import BadArgumentError
from ms_quant.pipeline.defaults import DEFAULTS

OF_TEXT = "seq_len", "windows", "float16", "drafts"
OF_TASK = "data", "shots", "subjects", "limit", "output"


def evaluate(
    checkpoint: CheckpointArgument,
    text: Annotated[
        Path | None, typer.Option(help="Text, JSON records, .parquet or .npz to predict.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Instead of a text: ceval, cmmlu, mmlu, gsm8k, hellaswag, arc, arc_easy or a "
            "file of questions (.jsonl)."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Directory of the task's files, as they were published.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(help="Examples before each question. Default: as people use.", min=0),
    ] = None,
    subjects: Annotated[
        str | None, typer.Option(help="Only these subjects of the task: logic,law")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first questions of each subject.", min=1)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Every question's answer and scores, JSON lines.")
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(help=f"Tokens of a window. Default: {DEFAULTS.seq_len}", min=2),
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Use only the first windows.", min=1)] = None,
    kv_cache: CacheOption = None,
    float16: Annotated[
        bool, typer.Option("--float16", help="Also as a runtime computes that has float16 alone.")
    ] = False,
    drafts: Annotated[
        bool,
        typer.Option(
            "--drafts",
            help="Also which share of the drafts of a multi-token prediction layer is what the "
            "model itself predicts.",
        ),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Another checkpoint of the vocabulary, such as the float model: also how much "
            "the perplexity or the answers differ from its own, and whether that is noise. It is "
            "computed in float32, with the cache that its files say.",
            callback=given_model,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a float or quantized checkpoint, or its accuracy on a task."""
    from ms_quant.cli import perplexity, tasks

    given = {
        "seq_len": seq_len,
        "windows": windows,
        "float16": float16 or None,
        "drafts": drafts or None,
        "data": data,
        "shots": shots,
        "subjects": subjects,
        "limit": limit,
        "output": output,
    }
    if (text is None) == (task is None):
        found = "neither was given" if text is None else "both were given"
        raise BadArgumentError(f"--text and --task: {found}, expected one of them")
    if text is not None:
        _require_absent(given, OF_TASK, "--text")
        perplexity.run(
            checkpoint,
            text,
            DEFAULTS.seq_len if seq_len is None else seq_len,
            windows,
            kv_cache,
            float16,
            drafts,
            against,
            as_json,
        )
    elif task is not None:
        _require_absent(given, OF_TEXT, "--task")
        names = None if subjects is None else tuple(subjects.split(","))
        asked = tasks.Question(task, data, shots, names, limit)
        tasks.run(checkpoint, asked, kv_cache, against, output, as_json)


def _require_absent(given: dict[str, Any], names: tuple[str, ...], other: str) -> None:
    """Refuses options that say nothing here."""
    for name in names:
        if given[name] is not None:
            raise BadArgumentError(
                f"--{name.replace('_', '-')}: was given, expected not with {other}"
            )
