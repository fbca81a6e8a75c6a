"""The ms-quant command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from ms_quant import __version__
from ms_quant.cli import checkpoints
from ms_quant.cli.analyze import analyze
from ms_quant.cli.arguments import example
from ms_quant.cli.console import run
from ms_quant.cli.evaluate import evaluate
from ms_quant.cli.generate import generate
from ms_quant.cli.quantize import quantize
from ms_quant.cli.report import report
from ms_quant.cli.schemes import schemes
from ms_quant.cli.serve import serve

app = typer.Typer(
    help="Quantize language models for Ascend, on any machine, and prove the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
COMMANDS: tuple[tuple[str, Callable[..., Any], str], ...] = (
    ("quantize", quantize, "Qwen3-8B -o Qwen3-8B-W8A8 --algorithm best --calib text.jsonl"),
    ("analyze", analyze, "Qwen3-8B --calib text.jsonl --schemes W8A8,W8A8_MIX -o hurts.json"),
    ("convert", checkpoints.convert, "Qwen3-8B-dynamic -o Qwen3-8B-ascend --format ascend"),
    ("verify", checkpoints.verify, "Qwen3-8B-W8A8 --source Qwen3-8B"),
    ("serve-check", checkpoints.serve_check, "Qwen3-8B-W8A8SC --runtime vllm-mindspore --tp 2"),
    ("eval", evaluate, "Qwen3-8B-W8A8 --text heldout.txt"),
    ("generate", generate, 'Qwen3-8B-W8A8 --prompt "The capital of France"'),
    ("serve", serve, "Qwen3-8B-W8A8 --port 8000"),
    ("inspect", checkpoints.inspect, "Qwen3-8B-W8A8"),
    ("report", report, "Qwen3-8B-W8A8 --against Qwen3-8B -o report.html"),
    ("schemes", schemes, "--json"),
)
"""Name, function and the arguments of an example, in the order of the help."""
for _name, _command, _arguments in COMMANDS:
    app.command(_name, epilog=example(f"ms-quant {_name} {_arguments}"))(_command)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"ms-quant {__version__}")
        raise typer.Exit


def main() -> None:
    run(app)
