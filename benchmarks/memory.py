"""Peak memory of quantizing a deep model against a shallow one of the same width.

    python benchmarks/memory.py [--blocks 6 24] [--hidden 1536] [--intermediate 4608]

Makes synthetic Qwen3 models with random weights (blocks of 100 MB and more in float32), runs
``ms-quant quantize`` on each in its own process, and reports the peak of anonymous memory above
what the process held once everything was imported and the arguments were checked. Anonymous
memory is what cannot be dropped under pressure; file pages are not counted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ms_quant.files.writer import TensorPlan, write_file
from ms_quant.models.config import parse_config

VOCABULARY = 4096
CHILD = """
import json, sys, threading, time
from pathlib import Path

def anonymous():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024

import ms_quant.quantization.work
from ms_quant.pipeline.run import QuantizeOptions, prepare, run_job
model, output, calib, scheme, algorithm = sys.argv[1:]
data = {"calib": Path(calib), "samples": 16} if scheme == "W8A8" else {}
options = QuantizeOptions(Path(model), Path(output), scheme, algorithm, **data)
checked = prepare(options)
base = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.02):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
started = time.monotonic()
run_job(options, checked=checked)
done.set()
thread.join()
print(json.dumps({"peak": peak - base, "imports": base, "seconds": time.monotonic() - started}))
"""


def make_model(directory: Path, blocks: int, hidden: int, intermediate: int) -> None:
    raw = {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": max(1, hidden // 512),
        "head_dim": 128,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    write_random(directory, raw)


def write_random(directory: Path, raw: dict[str, Any]) -> None:
    """A checkpoint in bfloat16 with random weights, of a ``config.json``."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw))
    rng = np.random.default_rng(0)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    shapes = parse_config(raw).parameter_shapes()

    def get(plan: TensorPlan) -> np.ndarray:
        if len(plan.shape) == 1:
            return np.ones(plan.shape, bfloat16)
        values = rng.standard_normal(plan.shape, np.float32)
        return (values / np.float32(plan.shape[1] ** 0.5)).astype(bfloat16)

    plans = [TensorPlan(name, bfloat16, shape) for name, shape in shapes.items()]
    write_file(directory / "model.safetensors", plans, get)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs=2, default=(6, 24))
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--intermediate", type=int, default=4608)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="ms-quant-memory-"))
    try:
        measure(args, work)
    finally:
        shutil.rmtree(work)


def measure(args: argparse.Namespace, work: Path) -> None:
    calib = work / "tokens.npz"
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (16, 256), dtype=np.int32)
    np.savez(calib, tokens=tokens)
    for blocks in args.blocks:
        make_model(work / str(blocks), blocks, args.hidden, args.intermediate)
    print("| scheme | algorithm | blocks | peak above imports, MB | of shallow | seconds |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for scheme, algorithm in (("W8A8_DYNAMIC", "minmax"), ("W8A8", "minmax")):
        peaks = []
        for blocks in args.blocks:
            output = work / f"{scheme}-{algorithm}-{blocks}"
            child = [sys.executable, "-c", CHILD, str(work / str(blocks)), str(output)]
            done = subprocess.run(
                [*child, str(calib), scheme, algorithm], check=True, stdout=subprocess.PIPE
            )
            shutil.rmtree(output)
            found = json.loads(done.stdout)
            peaks.append(found["peak"])
            ratio = found["peak"] / peaks[0]
            print(
                f"| {scheme} | {algorithm} | {blocks} | {found['peak'] / 1e6:.0f} | {ratio:.3f} | "
                f"{found['seconds']:.0f} |",
                flush=True,
            )
        worst = max(worst, peaks[1] / peaks[0])
    if worst > 1.15:
        raise SystemExit(f"the deep model needs {worst:.2f} times, expected at most 1.15")


if __name__ == "__main__":
    main()
