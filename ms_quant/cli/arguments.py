"""Arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ms_quant.algorithms.smooth import SmoothOptions
from ms_quant.cli.console import given_model

ALPHA = SmoothOptions().alpha
ModelArgument = Annotated[
    Path, typer.Argument(help="Directory of a Hugging Face checkpoint.", callback=given_model)
]
CacheOption = Annotated[
    str | None,
    typer.Option(help="float, C8 or C8_DYNAMIC. Default: as the checkpoint says"),
]
CheckpointArgument = Annotated[
    Path, typer.Argument(help="Directory of a checkpoint.", callback=given_model)
]


def example(line: str) -> str:
    return f"Example:  {line}"
