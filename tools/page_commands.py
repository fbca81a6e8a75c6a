"""The commands that the documents show.

A block ``console`` has commands after ``$`` and what they print on standard output. They run as
they are, in a directory that has ``models``. A block ``sh`` has commands alone, with names of
models that the reader has. This runs the first kind and writes what the commands print:

    python tools/page_commands.py docs/quickstart.md docs/sparse.md
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(console|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMPT = "$ "
STEP = re.compile(r"((?:[^\n]*\\\n)*[^\n]*)\n?(.*)", re.DOTALL)
TOOLS = ("ms-quant", "sparse-compress")
SERVER = "ms-quant serve "  # does not end by itself


def console_steps(text: str) -> list[tuple[str, str]]:
    """Each command with what it prints, in the order of the page."""
    steps = []
    for kind, body in BLOCK.findall(text):
        if kind == "console":
            for step in ("\n" + body).split(f"\n{PROMPT}")[1:]:
                command, shown = STEP.match(step).groups()
                steps.append((command, shown.rstrip("\n")))
    return steps


def shell_commands(text: str) -> list[str]:
    """Command lines of this project in ``sh`` blocks; those of servers are not ours to run."""
    lines = [
        line.split("  #")[0].strip()
        for kind, body in BLOCK.findall(text)
        if kind == "sh"
        for line in body.replace("\\\n", " ").splitlines()
    ]
    return [line for line in lines if line.startswith(TOOLS) and not line.startswith(SERVER)]


def run(command: str, directory: Path) -> tuple[str, int]:
    """What a command prints on standard output, without spaces at the ends of lines; its status."""
    tools = Path(sys.executable).parent
    found = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "100"}
    done = subprocess.run(
        command, shell=True, cwd=directory, env=found, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return "\n".join(lines).strip("\n"), done.returncode


def comparable(command: str, shown: str) -> str:
    """What does not depend on the machine: names and counts, but no times, errors or percentages.

    Sizes of compressed weights follow from calibration, whose sums a CPU rounds in its own way.
    Generated text does, too, and so may whether a small difference is told apart from noise.
    """
    if command.startswith("ms-quant generate"):
        return ""
    if command.startswith("sparse-compress"):
        shown = re.sub(r"\d[\d,.]*", "#", shown)
    shown = re.sub(r"(seconds|memory bytes) .*", r"\1 #", shown)
    shown = re.sub(r"[+-]?\d+\.\d+(e-?\d+)?", "#", shown)
    shown = re.sub(r"not told apart from noise|more than two standard errors", "#", shown)
    return re.sub(r"([─━])\1*", r"\1", re.sub(r"[ \n]+", " ", shown))


def main() -> None:
    for page in map(Path, sys.argv[1:]):
        text = page.read_text()
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "models").symlink_to(ROOT / "models")
            for command, shown in console_steps(text):
                printed, _ = run(command, Path(place))
                before = f"{PROMPT}{command}\n" + (f"{shown}\n" if shown else "")
                text = text.replace(
                    before, f"{PROMPT}{command}\n" + (f"{printed}\n" if printed else ""), 1
                )
        page.write_text(text)


if __name__ == "__main__":
    main()
