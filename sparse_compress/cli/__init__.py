"""The sparse-compress command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from ms_quant import __version__
from ms_quant.cli.arguments import example
from ms_quant.cli.console import run as run_app
from sparse_compress.cli import directories
from sparse_compress.cli.run import run

app = typer.Typer(
    help="Make W8A8SC checkpoints for the Atlas 300I Duo, on any machine, and prove them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS: tuple[tuple[str, Callable[..., Any], str], ...] = (
    ("run", run, "Qwen3-8B -o Qwen3-8B-W8A8SC --target-ratio 0.45 --calib text.jsonl"),
    ("compress", directories.compress, "Qwen3-8B-W8A8S -o Qwen3-8B-W8A8SC"),
    ("decompress", directories.decompress, "Qwen3-8B-W8A8SC -o Qwen3-8B-W8A8S"),
    ("verify", directories.verify, "Qwen3-8B-W8A8SC --source Qwen3-8B"),
    ("info", directories.info, "Qwen3-8B-W8A8SC --plot layers.html"),
)
"""Name, function and the arguments of an example, in the order of the help."""
for _name, _command, _arguments in COMMANDS:
    app.command(_name, epilog=example(f"sparse-compress {_name} {_arguments}"))(_command)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"sparse-compress {__version__}")
        raise typer.Exit


def main() -> None:
    run_app(app)
