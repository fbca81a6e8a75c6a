"""Models with experts: what quantizing them costs.

    python benchmarks/experts.py peer [--msmodelslim PYTHON] [--llmcompressor PYTHON]
    python benchmarks/experts.py memory
    python benchmarks/experts.py r1 [--fp8]
    python benchmarks/experts.py speed [--fp8]

``peer``: a random Qwen3-MoE to W8A8_DYNAMIC beside msModelSlim and llm-compressor, each in the
environment of its own whose Python is given. ``memory``: peaks of runs with few and many experts
and layers. ``r1``: one block of DeepSeek-R1's sizes with 16 of its 256 experts. ``speed``: bytes a
second of the same without calibration, beside copying the same bytes, and beside the kernels alone.

Every measured command has a process of its own; memory is the peak that the kernel has noted of it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import OURS, Cost, cost, limited_to
from peers import free_of_model, in_one_shot, model_slim
from routed_sources import DEEPSEEK_R1, QWEN3_MOE, write_source, write_tokens

from ms_quant import kernels

ROOT = Path(__file__).parent.parent
MIB = 1 << 20
MOST_GROWTH = 1.15
GROWTH: dict[str, Any] = {
    **QWEN3_MOE,
    "hidden_size": 768,
    "moe_intermediate_size": 768,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_hidden_layers": 4,
    "num_experts": 8,
    "vocab_size": 2048,
}
"""An expert takes 6.8 MiB in float32."""
STATIC = ("--scheme", "attention=W8A8,W8A8_DYNAMIC", "--format", "ascend")
FOUR_BITS = ("--scheme", "attention=W8A8,experts=W4A8_DYNAMIC,W8A8_DYNAMIC", "--format", "ascend")
CALIBRATED: dict[str, tuple[str, ...]] = {
    "attention W8A8 smoothed, the rest W8A8_DYNAMIC": (
        *STATIC,
        "--algorithm",
        "attention=smoothquant,minmax",
    ),
    "the same, experts W4A8_DYNAMIC by GPTQ": (
        *FOUR_BITS,
        "--algorithm",
        "attention=smoothquant,experts=gptq,minmax",
    ),
}
WITHOUT = ("--scheme", "W8A8_DYNAMIC", "--format", "ascend")


def quantize(model: Path, output: Path, *arguments: str, threads: int = 2) -> Cost:
    """What ``ms-quant quantize`` takes; the output is removed."""
    command = [sys.executable, "-c", OURS, "quantize", str(model), "-o", str(output), *arguments]
    try:
        return cost(command, limited_to(threads))
    finally:
        shutil.rmtree(output, ignore_errors=True)


def row(*cells: object) -> None:
    """Prints a row of a table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def head(*titles: str) -> None:
    """Prints the head of a table."""
    row(*titles)
    print(f"|{'---|' * len(titles)}", flush=True)


def compare_peers(args: argparse.Namespace, work: Path) -> None:
    model, output = work / "model", work / "out"
    write_source(model, QWEN3_MOE)
    tools = {}
    for format in ("ascend", "compressed-tensors"):
        command = [sys.executable, "-c", OURS, "quantize", str(model), "-o", str(output)]
        command += ["--scheme", "W8A8_DYNAMIC", "--format", format]
        tools[f"ms-quant, {format}"] = command
    if args.msmodelslim:
        tools["msModelSlim"] = model_slim(args.msmodelslim, model, output, work)
    if args.llmcompressor:
        for name, make in (("oneshot", in_one_shot), ("model_free_ptq", free_of_model)):
            command = make(args.llmcompressor, model, output, args.threads)
            tools[f"llm-compressor, {name}"] = command
    found: dict[str, list[Cost]] = {name: [] for name in tools}
    for _ in range(args.rounds):
        for name, command in tools.items():
            shutil.rmtree(output, ignore_errors=True)
            found[name].append(cost(command, limited_to(args.threads)))
    head("tool", "CPU s", "peak MiB", "without file pages")
    for name, costs in found.items():
        seconds = min(one.cpu for one in costs)
        peaks = (max(getattr(c, kind) for c in costs) for kind in ("resident", "anonymous"))
        row(name, f"{seconds:.1f}", *(f"{peak / MIB:.0f}" for peak in peaks))
    ours = [c for name, costs in found.items() if name.startswith("ms-quant") for c in costs]
    others = [c for name, costs in found.items() if not name.startswith("ms-quant") for c in costs]
    for one in others:
        if max(c.cpu for c in ours) >= one.cpu or max(c.resident for c in ours) >= one.resident:
            raise SystemExit("a peer took less than ours, expected more in both")


def measure_growth(args: argparse.Namespace, work: Path) -> None:
    tokens = work / "tokens.npz"
    write_tokens(tokens, GROWTH["vocab_size"], 8, 256)
    data = ("--calib", str(tokens), "--samples", "8", "--seq-len", "256")
    runs = {"W8A8_DYNAMIC": WITHOUT}
    runs |= {name: (*asked, *data) for name, asked in CALIBRATED.items()}
    sizes: dict[str, dict[str, Any]] = {
        "8 experts, 4 layers": {},
        "64 experts, 4 layers": {"num_experts": 64},
        "8 experts, 16 layers": {"num_hidden_layers": 16},
    }
    first: dict[str, Cost] = {}
    worst = 0.0
    head("work", "model", "peak MiB", "of the first", "without file pages", "of the first", "CPU s")
    for size, changed in sizes.items():
        model = work / "model"
        _in_child("write_source", model, {**GROWTH, **changed})
        for name, arguments in runs.items():
            if args.only not in name:
                continue
            found = quantize(model, work / "out", *arguments)
            least = first.setdefault(name, found)
            shares = found.resident / least.resident, found.anonymous / least.anonymous
            worst = max(worst, *shares)
            peak = f"{found.resident / MIB:.0f}", f"{shares[0]:.3f}"
            alone = f"{found.anonymous / MIB:.0f}", f"{shares[1]:.3f}"
            row(name, size, *peak, *alone, f"{found.cpu:.0f}")
        shutil.rmtree(model)
    if worst > MOST_GROWTH:
        raise SystemExit(f"memory grows {worst:.2f} times, expected at most {MOST_GROWTH}")


def make_r1(work: Path, fp8: bool, made: Path | None) -> Path:
    """The block, in bfloat16 or as DeepSeek publishes it, unless it is made already."""
    if made is not None:
        return made
    model = work / "bf16"
    _in_child("write_source", model, DEEPSEEK_R1)
    if not fp8:
        return model
    maker = ROOT / "tools" / "make_fp8_source.py"
    subprocess.run([sys.executable, str(maker), str(model), str(work / "fp8")], check=True)
    shutil.rmtree(model)
    return work / "fp8"


def _in_child(function: str, *arguments: object) -> None:
    """Calls a function of routed_sources in a process that lets go of its memory."""
    code = f"from pathlib import Path, PosixPath; import routed_sources as r; r.{function}"
    code += f"({', '.join(map(repr, arguments))})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def measure_r1(args: argparse.Namespace, work: Path) -> None:
    model, tokens = make_r1(work, args.fp8, args.source), work / "tokens.npz"
    write_tokens(tokens, DEEPSEEK_R1["vocab_size"], 16, 512)
    data = ("--calib", str(tokens), "--samples", "16", "--seq-len", "512")
    runs: dict[str, tuple[int, tuple[str, ...]]] = {
        "W8A8_DYNAMIC": (3, WITHOUT),
        "W4A8_DYNAMIC": (3, ("--scheme", "W4A8_DYNAMIC", "--format", "ascend")),
    }
    for name, asked in CALIBRATED.items():
        runs[f"{name}, 8,192 tokens"] = 6, (*asked, *data)
    head("work", "source", "peak MiB", "without file pages", "aim GB", "CPU s", "s")
    for name, (aim, arguments) in runs.items():
        if args.only not in name:
            continue
        found = quantize(model, work / "out", *arguments)
        peaks = f"{found.resident / MIB:.0f}", f"{found.anonymous / MIB:.0f}"
        source = "FP8" if args.fp8 else "bf16"
        row(name, source, *peaks, aim, f"{found.cpu:.0f}", f"{found.wall:.0f}")


def measure_speed(args: argparse.Namespace, work: Path) -> None:
    from speed import compare

    compare(make_r1(work, args.fp8, args.source), work / "out", args.rounds, args.threads)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="where files go; default: a temporary directory")
    commands = parser.add_subparsers(required=True)
    peer = commands.add_parser("peer")
    peer.add_argument("--msmodelslim", type=Path, help="the Python of its environment")
    peer.add_argument("--llmcompressor", type=Path, help="the Python of its environment")
    peer.set_defaults(run=compare_peers)
    memory = commands.add_parser("memory")
    memory.set_defaults(run=measure_growth)
    r1 = commands.add_parser("r1")
    r1.set_defaults(run=measure_r1)
    speed = commands.add_parser("speed")
    speed.set_defaults(run=measure_speed)
    for command in (peer, speed):
        command.add_argument("--rounds", type=int, default=2)
        command.add_argument("--threads", type=int, default=2)
    for command in (r1, speed):
        command.add_argument("--fp8", action="store_true", help="a source as DeepSeek publishes it")
        command.add_argument("--source", type=Path, help="that was made before")
    for command in (memory, r1):
        command.add_argument("--only", default="", help="rows whose names have this in them")
    args = parser.parse_args(given)
    print(f"Instruction set: {kernels.best_isa()}.\n")
    with tempfile.TemporaryDirectory(prefix="ms-quant-experts-", dir=args.work) as directory:
        args.run(args, Path(directory))


if __name__ == "__main__":
    main()
