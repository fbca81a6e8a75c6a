"""The command that has a model write."""

from __future__ import annotations

from typing import Annotated

import typer

from ms_quant.cli.arguments import CacheOption, CheckpointArgument
from ms_quant.cli.console import JsonOption, emit
from ms_quant.cli.running import note_length, opened
from ms_quant.pipeline.defaults import DEFAULTS


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

    model = opened(checkpoint)
    found = text_of(model, prompt, max_tokens=max_tokens, kv_cache=kv_cache, tokenizer=checkpoint)
    note_length(model, checkpoint, found.positions)
    emit(found.as_json(), as_json, lambda result: print(prompt + result["text"]))
