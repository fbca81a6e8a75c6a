"""Whole models on CPU, float and quantized: tokens a second in prefill and in decode, and memory.

    python benchmarks/end_to_end.py [MODEL ...] [--repeats 2]

For each model, by default the bundled one and a random Qwen2 of the shape of Qwen2.5-0.5B, each
checkpoint is measured in processes of its own: prefill is a whole ``ms-quant eval`` of windows of
256 tokens, the head and reading the blocks from disk among it; decode is greedy generation after 64
tokens, the first one left out; memory is the peak of the process that generates.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory import write_random

from ms_quant.pipeline.request import QuantizeOptions
from ms_quant.pipeline.run import run_job

BUNDLED = Path(__file__).parent.parent / "models" / "stdlib-qwen3-6m"
HALF_BILLION: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
SCHEMES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("W8A8_DYNAMIC", {}),
    ("W8A16", {}),
    ("W4A16", {"group_size": 128}),
    ("W4A8_DYNAMIC", {}),
)
WINDOWS, LENGTH, PROMPT, NEW = 8, 256, 64, 48
CHILD = """
import json, sys, time
from pathlib import Path
import numpy as np
from ms_quant.formats.opening import open_model
from ms_quant.evaluation.generation import Generator
from ms_quant.evaluation.perplexity import perplexity
what, windows, length, prompt, new = sys.argv[2], *map(int, sys.argv[3:])
model = open_model(Path(sys.argv[1]))
tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (windows, length + 1))
tokens = tokens.astype(np.int32)
if what == "prefill":
    perplexity(model, tokens[:1, :8])
    started = time.perf_counter()
    perplexity(model, tokens)
    found = windows * length / (time.perf_counter() - started)
else:
    generator = Generator(model)
    times = [time.perf_counter() for _ in generator.generate(tokens[0, :prompt], new)]
    found = (len(times) - 1) / (times[-1] - times[0])
status = Path("/proc/self/status").read_text()
peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
print(json.dumps([found, peak]))
"""


def measure(checkpoint: Path, what: str, repeats: int) -> tuple[float, int]:
    """Tokens a second, the best of some processes, and the bytes that the last one held."""
    best, peak = 0.0, 0
    sizes = map(str, (WINDOWS, LENGTH, PROMPT, NEW))
    command = [sys.executable, "-c", CHILD, str(checkpoint), what, *sizes]
    for _ in range(repeats):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        found, peak = json.loads(done.stdout.splitlines()[-1])
        best = max(best, found)
    return best, peak


def rows(model: Path, name: str, work: Path, repeats: int) -> None:
    floats: dict[str, float] = {}
    for scheme, options in (("float", {}), *SCHEMES):
        checkpoint = model
        if scheme != "float":
            checkpoint = work / f"{name}-{scheme}"
            run_job(QuantizeOptions(model, checkpoint, scheme, scheme_options=options))
        cells = []
        for what in ("prefill", "decode"):
            speed, peak = measure(checkpoint, what, repeats)
            floats.setdefault(what, speed)
            cells += [f"{speed:.1f}", f"{speed / floats[what]:.2f}"]
        print(f"| {name} | {scheme} | {' | '.join(cells)} | {peak / 1e6:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    print("| model | scheme | prefill tokens/s | x float | decode tokens/s | x float | MB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="ms-quant-speed-") as directory:
        work, models = Path(directory), arguments.models
        if not models:
            write_random(work / "qwen2-0.5b", HALF_BILLION)
            models = [BUNDLED, work / "qwen2-0.5b"]
        for model in models:
            rows(model, model.name, work, arguments.repeats)


if __name__ == "__main__":
    main()
