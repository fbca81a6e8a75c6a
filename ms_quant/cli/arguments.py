"""Arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ms_quant.algorithms.smooth import SmoothOptions
from ms_quant.cli.console import given_directory, given_model

ALPHA = SmoothOptions().alpha
ModelArgument = Annotated[
    Path, typer.Argument(help="Directory of a Hugging Face checkpoint.", callback=given_model)
]
SourceArgument = Annotated[
    Path,
    typer.Argument(
        help="Directory of a Hugging Face checkpoint, or of diffusers.", callback=given_directory
    ),
]
CacheOption = Annotated[
    str | None,
    typer.Option(help="float, C8 or C8_DYNAMIC. Default: as the checkpoint says"),
]
CheckpointArgument = Annotated[
    Path, typer.Argument(help="Directory of a checkpoint.", callback=given_model)
]

MadeArgument = Annotated[
    Path,
    typer.Argument(help="Directory of a checkpoint, or of diffusers.", callback=given_directory),
]


def example(line: str) -> str:
    return f"Example:  {line}"
