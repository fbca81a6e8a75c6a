"""The commands that run a model: perplexity and text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ms_quant.cli.arguments import CacheOption, CheckpointArgument
from ms_quant.cli.console import (
    JsonOption,
    block_progress,
    emit,
    exit_if_problems,
    note,
    show_fields,
)
from ms_quant.pipeline.defaults import DEFAULTS


def evaluate(
    checkpoint: CheckpointArgument,
    text: Annotated[Path, typer.Option(help="Text, JSON records, .parquet or .npz to predict.")],
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = DEFAULTS.seq_len,
    windows: Annotated[int | None, typer.Option(help="Use only the first windows.", min=1)] = None,
    kv_cache: CacheOption = None,
    float16: Annotated[
        bool, typer.Option("--float16", help="Also as a runtime computes that has float16 alone.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a float or quantized checkpoint."""
    from ms_quant.data.calibration import eval_windows
    from ms_quant.evaluation.perplexity import perplexity
    from ms_quant.formats.inspection import cache_name
    from ms_quant.formats.opening import open_model

    model = open_model(checkpoint)
    _note_oddities(model)
    tokens = eval_windows(text, checkpoint, seq_len, windows)
    with block_progress("evaluating", model.config.num_layers) as progress:
        measured = perplexity(model, tokens, progress, kv_cache=kv_cache).as_json()
    if model.phased:
        with block_progress("evaluating decode", model.config.num_layers) as progress:
            decoded = perplexity(model, tokens, progress, decode=True, kv_cache=kv_cache)
        measured["perplexity_decode"] = decoded.perplexity
        measured["loss_decode"] = decoded.loss
    problems = []
    if float16:
        from ms_quant.evaluation.float16_forward import Float16OverflowError

        try:
            with block_progress("evaluating float16", model.config.num_layers) as progress:
                narrow = perplexity(model, tokens, progress, float16=True)
            measured["perplexity_float16"] = narrow.perplexity
            measured["loss_float16"] = narrow.loss
        except Float16OverflowError as error:
            problems.append(str(error))
            measured["float16_overflow"] = str(error)
    emit(
        {
            "checkpoint": str(checkpoint),
            "format": model.format,
            "kv_cache": kv_cache or cache_name(model),
            **measured,
        },
        as_json,
        show_fields,
    )
    exit_if_problems(problems)


def _note_oddities(model: Any) -> None:
    """What is wrong or odd in the files of a checkpoint that can be read all the same."""
    structure = getattr(model, "structure", None)
    for text in [*structure.defects, *structure.notes] if structure else []:
        note(f"note: {text}")


def generate(
    checkpoint: CheckpointArgument,
    prompt: Annotated[str, typer.Option(help="What the text begins with.")],
    max_tokens: Annotated[
        int, typer.Option(help="At most this many new tokens.", min=1)
    ] = DEFAULTS.max_tokens,
    kv_cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Greedy text with a key-value cache."""
    from ms_quant.evaluation.generation import generate as text_of
    from ms_quant.formats.opening import open_model

    model = open_model(checkpoint)
    _note_oddities(model)
    found = text_of(model, prompt, max_tokens=max_tokens, kv_cache=kv_cache, tokenizer=checkpoint)
    emit(found.as_json(), as_json, lambda result: print(prompt + result["text"]))
