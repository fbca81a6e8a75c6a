"""The main job on the bundled models: quantize, verify, evaluate, one table.

The dense one four ways, and a DeepSeek-V3 in miniature from FP8, as DeepSeek-R1 is published.

    python examples/demo.py [OUTPUT_DIRECTORY]

Every step is a command as a user would type it, run in a process of its own, so the memory and
seconds in the table are the command's. The default directory is cleared; one that is named must
be new, empty or of an earlier demo, whose checkpoints are kept.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "stdlib-qwen3-6m"
DEEPSEEK = ROOT / "models" / "stdlib-deepseek"
MAKE_FP8 = ROOT / "tools" / "make_fp8_source.py"
CALIBRATION = ROOT / "models" / "text" / "calibration.txt"
DEFAULT = ROOT / "demo-output"
MARK = ".ms-quant-demo"
HELDOUT = ROOT / "models" / "text" / "heldout.txt"
CALIB = ("--calib", str(CALIBRATION), "--samples", "64")
CHECKPOINTS = {
    "W8A8 min-max": ("ms-quant", "quantize", "--scheme", "W8A8", *CALIB),
    "W8A8 OSL": ("ms-quant", "quantize", "--scheme", "W8A8", "--algorithm", "osl", *CALIB),
    "W8A8_DYNAMIC": ("ms-quant", "quantize", "--scheme", "W8A8_DYNAMIC"),
    "W8A8SC TP2 50 %": ("sparse-compress", "run", "--tp", "2", "--sparsity", "0.5", *CALIB),
}


OF_DEEPSEEK = {
    "DeepSeek FP8, W8A8 OSL": (
        *("ms-quant", "quantize", "--scheme", "W8A8", "--algorithm", "osl"),
        *("--format", "golden-stick", *CALIB),
    ),
}


def run(*command: str) -> tuple[dict, float, int]:
    """Runs a command with --json: its result, seconds, and peak resident bytes."""
    print("$", " ".join(command), file=sys.stderr)
    tool = Path(sys.executable).parent / command[0]
    started = time.monotonic()
    process = subprocess.Popen([tool, *command[1:], "--json"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return json.loads(output), time.monotonic() - started, usage.ru_maxrss * 1024


def size(directory: Path) -> int:
    """Bytes of the weights: what a server would load."""
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


def make_directory(arguments: list[str]) -> Path:
    """The directory to write to, made and marked; someone else's is refused."""
    output = Path(arguments[0]) if arguments else DEFAULT
    if not arguments and output.exists():
        shutil.rmtree(output)
    foreign = output.exists() and not (output / MARK).exists()
    if foreign and (output.is_file() or any(output.iterdir())):
        raise SystemExit(f"{output}: exists with other content, expected a new directory")
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).touch()
    return output


def main() -> None:
    output = make_directory(sys.argv[1:])
    table = Table(
        "checkpoint", "held-out perplexity", "vs source", "bytes", "of it", "seconds", "peak MB"
    )
    add_rows(table, output, "Qwen3, bf16", MODEL, CHECKPOINTS)
    source = output / "deepseek-fp8"
    if not source.exists():
        subprocess.run([sys.executable, MAKE_FP8, DEEPSEEK, source], check=True)
    table.add_section()
    add_rows(table, output, "DeepSeek, FP8", source, OF_DEEPSEEK)
    Console(width=110).print(table)
    print(f"Verified checkpoints are in {output}")


def add_rows(
    table: Table, output: Path, title: str, model: Path, commands: dict[str, tuple[str, ...]]
) -> None:
    """A row for a model, and one for each checkpoint that a command makes of it."""
    evaluated, _, peak = run("ms-quant", "eval", str(model), "--text", str(HELDOUT))
    exact, full = evaluated["perplexity"], size(model)
    table.add_row(title, f"{exact:.3f}", "", f"{full:,}", "1.000", "", f"{peak / 1e6:.0f}")
    for name, command in commands.items():
        made = output / name.lower().replace(" %", "").replace(",", "").replace(" ", "-")
        tool, verb, *options = command
        result, seconds, peak = run(tool, verb, str(model), "-o", str(made), *options)
        run(tool, "verify", str(made), "--source", str(model))
        evaluated, _, _ = run("ms-quant", "eval", str(made), "--text", str(HELDOUT))
        table.add_row(
            name,
            f"{evaluated['perplexity']:.3f}",
            f"{100 * (evaluated['perplexity'] / exact - 1):+.2f} %",
            f"{size(made):,}",
            f"{size(made) / full:.3f}",
            "kept" if result["finished_before"] else f"{seconds:.1f}",
            f"{peak / 1e6:.0f}",
        )


if __name__ == "__main__":
    main()
