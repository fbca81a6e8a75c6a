"""Time and peak memory of drawing calibration windows from files of several sizes.

    python benchmarks/data.py [--model models/stdlib-qwen3-6m] [--mb 0.35 24 120 500]

Writes running text, JSON lines and one JSON list of each size, and reads each in a process of its
own: 64 windows of 256 tokens. Memory is the peak of the process above what it held once the
tokenizer was loaded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "models" / "text" / "calibration.txt"
CHILD = """
import json, resource, sys, time
from ms_quant.data.calibration import load_tokens
from ms_quant.data.tokenizer import load_tokenizer
path, model = sys.argv[1:]
load_tokenizer(model).encode("a")
base, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
windows = load_tokens(path, model, 64, 256, 0)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([len(windows), time.process_time() - started, (peak - base) / 1e3]))
"""


def write(path: Path, size: int) -> None:
    """Pieces of the bundled text, again and again, each with a number of its own."""
    text = TEXT.read_text()
    parts = [text[at : at + 2000] for at in range(0, len(text), 2000)]
    written = 0
    with path.open("w") as file:
        file.write("[" * (path.suffix == ".json"))
        while written < size:
            part = f"{written}\n{parts[written % len(parts)]}"
            if path.suffix == ".json":
                part = ",\n" * (written > 0) + json.dumps({"text": part})
            elif path.suffix == ".jsonl":
                part = json.dumps({"text": part}) + "\n"
            written += file.write(part)
        file.write("]" * (path.suffix == ".json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "stdlib-qwen3-6m")
    parser.add_argument("--mb", type=float, nargs="+", default=(0.35, 24, 120, 500))
    parser.add_argument(
        "--limit", type=float, default=120, help="seconds before a file is given up"
    )
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="ms-quant-data-"))
    print("| file | MB | windows | CPU s | MB of memory |\n|---|---|---|---|---|")
    try:
        for size in args.mb:
            for suffix in (".txt", ".jsonl", ".json"):
                path = work / f"data{suffix}"
                write(path, int(size * 1e6))
                print(
                    f"| {suffix} | {size:g} | {measure(path, args.model, args.limit)} |", flush=True
                )
                path.unlink()
    finally:
        shutil.rmtree(work)


def measure(path: Path, model: Path, limit: float) -> str:
    child = [sys.executable, "-c", CHILD, str(path), str(model)]
    try:
        done = subprocess.run(child, check=True, stdout=subprocess.PIPE, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"- | over {limit:g} | -"
    windows, seconds, memory = json.loads(done.stdout)
    return f"{windows} | {seconds:.1f} | {memory:.0f}"


if __name__ == "__main__":
    main()
