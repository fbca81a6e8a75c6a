"""Arguments that several commands take, and a note that several give."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ms_quant.cli.console import note
from sparse_compress.codec import backend_note

WorkersOption = Annotated[
    int, typer.Option(help="Threads that code one tensor.", min=1, show_default="all cores")
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan, do nothing.")]


def note_backend() -> None:
    """Says so, once, when the slow codec is at work."""
    if backend_note():
        note(f"note: {backend_note()}")
