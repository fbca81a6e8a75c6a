"""What making a checkpoint costs, of a small Qwen3 with random weights, beside msModelSlim.

    python benchmarks/quantization_speed.py [--msmodelslim PYTHON] [--rounds 2]

The model has 33.6 million parameters in float32: hidden size 512, 8 blocks, intermediate size
1536, a vocabulary of 8192. Calibration is 48 windows of the bundled text, 25,344 tokens. Every
command runs in a process of its own with one thread, in turn; of several rounds the least is
told: seconds of CPU of the whole process, imports too, and the peak of its resident memory, in MiB.
Before the table: what the float products of the linears take at the least, at the speed of the
largest products that one thread of BLAS does here.
``PYTHON`` is that of an environment with msmodelslim and torch; the pairs of rows do the same
work, though not with the same algorithms in every detail.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ms_quant.data.calibration import load_tokens
from ms_quant.data.tokenizer import load_tokenizer
from ms_quant.files.writer import TensorPlan, write_file
from ms_quant.models.config import parse_config

MODELS = Path(__file__).parent.parent / "models"
BUNDLED, TEXT = MODELS / "stdlib-qwen3-6m", MODELS / "text" / "calibration.txt"
SAMPLES, LENGTH = 48, 528
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
SPREAD = 0.02  # of the weights
PER_CHANNEL = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
PER_TOKEN = {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"}
PER_TENSOR = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}
FLOPS = "from ms_quant.pipeline.estimate import flops; print(max(flops() for _ in range(9)))"
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
COMMAND = "import sys; sys.argv[0] = 'ms-quant'; from ms_quant.cli.main import main; main()"


@dataclass(frozen=True)
class Work:
    """What both are asked to do.

    Attributes:
        name: of the row.
        arguments: of ``ms-quant quantize``.
        calibrated: whether it needs data.
        process: the processors of msModelSlim's recipe.
    """

    name: str
    arguments: tuple[str, ...]
    calibrated: bool
    process: list[dict[str, Any]]


def linear(act: dict[str, Any], **weight: str) -> dict[str, Any]:
    qconfig = {"act": act, "weight": {**PER_CHANNEL, **weight}}
    return {"type": "linear_quant", "qconfig": qconfig, "include": ["*"]}


def smooth(kind: str, alpha: float) -> dict[str, Any]:
    return {"type": kind, "alpha": alpha}


WORK = (
    Work("W8A8_DYNAMIC, data free", ("W8A8_DYNAMIC", "minmax"), False, [linear(PER_TOKEN)]),
    Work("W8A8 min-max", ("W8A8", "minmax"), True, [linear(PER_TENSOR)]),
    Work(
        "W8A8 smoothing",
        ("W8A8", "smoothquant"),
        True,
        [smooth("iter_smooth", 0.9), linear(PER_TENSOR)],
    ),
    Work(
        "W8A8_DYNAMIC smoothing and GPTQ",
        ("W8A8_DYNAMIC", "smoothquant+gptq"),
        True,
        [smooth("smooth_quant", 0.5), linear(PER_TOKEN, method="gptq")],
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--msmodelslim", type=Path, help="the Python of its environment")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="ms-quant-speed-"))
    try:
        # What this process has held counts as the peak of those that it starts.
        maker = multiprocessing.Process(target=make_inputs, args=(work,))
        maker.start()
        maker.join()
        tokens, texts = work / "tokens.npz", work / "texts.jsonl"
        print(f"{least_seconds()}\n")
        print("| work | tool | CPU s | peak MiB |")
        print("|---|---|---|---|")
        for asked in WORK:
            tools = {"ms-quant": ours(asked, work, tokens)}
            if args.msmodelslim:
                tools["msModelSlim"] = theirs(asked, work, texts, args.msmodelslim)
            for name, (seconds, peak) in compare(tools, work / "out", args.rounds).items():
                print(f"| {asked.name} | {name} | {seconds:.1f} | {peak / 1024:.0f} |", flush=True)
    finally:
        shutil.rmtree(work)


def least_seconds() -> str:
    """What this machine does, and how long the linears take of it."""
    command = [sys.executable, "-c", FLOPS]
    done = subprocess.run(
        command, env={**os.environ, **THREADS}, check=True, stdout=subprocess.PIPE
    )
    speed, config = float(done.stdout), parse_config(CONFIG)
    weights = sum(block.size for block in config.blocks)
    seconds = 2 * weights * SAMPLES * LENGTH / speed
    return (
        f"One thread of BLAS does {speed / 1e9:.0f} GFLOPS here: the linears of "
        f"{SAMPLES * LENGTH:,} tokens take {seconds:.1f} s."
    )


def make_inputs(work: Path) -> None:
    """Makes the model, and the calibration data for both: tokens, and their text."""
    model = work / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(BUNDLED / name, model)
    shapes, rng = parse_config(CONFIG).parameter_shapes(), np.random.default_rng(0)
    float32 = np.dtype(np.float32)

    def get(plan: TensorPlan) -> np.ndarray:
        if len(plan.shape) == 1:
            return np.ones(plan.shape, float32)
        return rng.standard_normal(plan.shape, float32) * np.float32(SPREAD)

    plans = [TensorPlan(name, float32, shape) for name, shape in shapes.items()]
    write_file(model / "model.safetensors", plans, get)
    windows = load_tokens(TEXT, model, SAMPLES, LENGTH, 0)
    np.savez(work / "tokens.npz", tokens=windows)
    tokenizer = load_tokenizer(model)
    lines = [json.dumps({"inputs_pretokenized": tokenizer.decode(row.tolist())}) for row in windows]
    (work / "texts.jsonl").write_text("\n".join(lines) + "\n")


def ours(asked: Work, work: Path, tokens: Path) -> list[str]:
    scheme, algorithm = asked.arguments
    command = [sys.executable, "-c", COMMAND, "quantize", str(work / "model")]
    command += ["-o", str(work / "out"), "--scheme", scheme, "--algorithm", algorithm]
    data = ["--calib", str(tokens), "--samples", str(SAMPLES), "--seq-len", str(LENGTH)]
    return command + data if asked.calibrated else command


def theirs(asked: Work, work: Path, texts: Path, python: Path) -> list[str]:
    label = {"w_bit": 8, "a_bit": 8, "is_sparse": False, "kv_cache": False}
    metadata = {"config_id": "a", "score": 90, "verified_model_types": ["Qwen3-8B"], "label": label}
    saver = {"type": "ascendv1_saver", "part_file_size": 4}
    spec = {"process": asked.process, "save": [saver], "dataset": str(texts)}
    recipe = work / f"{WORK.index(asked)}.yaml"
    whole = {"apiversion": "modelslim_v1", "metadata": metadata, "spec": spec}
    recipe.write_text(yaml.safe_dump(whole))
    command = [str(python.parent / "msmodelslim"), "quant", "--model_type", "Qwen3-8B"]
    command += ["--model_path", str(work / "model"), "--save_path", str(work / "out")]
    return [
        *command,
        "--device",
        "cpu",
        "--config_path",
        str(recipe),
        "--trust_remote_code",
        "True",
    ]


def compare(
    tools: dict[str, list[str]], output: Path, rounds: int
) -> dict[str, tuple[float, float]]:
    """Least seconds of CPU, and most memory in KiB, of each command, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    peaks: dict[str, list[float]] = {name: [] for name in tools}
    for _ in range(rounds):
        for name, command in tools.items():
            shutil.rmtree(output, ignore_errors=True)
            used, peak = run(command)
            seconds[name].append(used)
            peaks[name].append(peak)
    return {name: (min(seconds[name]), max(peaks[name])) for name in tools}


def run(command: list[str]) -> tuple[float, float]:
    """CPU seconds, and peak resident memory in KiB, of a command."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env={**os.environ, **THREADS}, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{command}:\n{log.read().decode(errors='replace')[-2000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss


if __name__ == "__main__":
    main()
