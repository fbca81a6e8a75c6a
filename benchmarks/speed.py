"""How fast a model is quantized from its weights, beside what the machine could do.

Two bounds: copying, which reads the same bytes and writes as many as the output has, and the
kernels, the CPU time of one thread that only rounds what is stored and hashes. Both sides of each
round begin with the source in the page cache, as far as memory goes, and end when what was written
is on the disk. Copying waits before as long as ms-quant takes to start: a virtual machine may give
memory that was free for a second back to its host, and writing to it costs more then.

The output has several files, as that of a large model has, of which one is hashed while the next is
made. What starting takes, which a large model does not notice, is measured with ``--dry-run`` and
told apart.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from measure import OURS, Cost, cost, limited_to

from ms_quant import kernels
from ms_quant.models.config import load_config

BLOCK = 4 << 20
ROWS, COLUMNS, WIDTH = 64, 7168, 128
FILES = 8
R1_OUTPUT = 674.0
"""GB of DeepSeek-R1 in W8A8."""
HEADER = "| work | GB | s | CPU s | MB/s | MB per CPU s |\n|---|---|---|---|---|---|"


def compare(model: Path, output: Path, rounds: int, threads: int) -> None:
    """Prints the table and what it means for DeepSeek-R1."""
    source = [*model.glob("*.safetensors")]
    read = sum(path.stat().st_size for path in source)
    quantized: list[Cost] = []
    copied: list[Cost] = []
    command = [sys.executable, "-c", OURS, "quantize", str(model), "-o", str(output)]
    command += ["--scheme", "W8A8_DYNAMIC", "--format", "ascend"]
    shard = sum(block.size for block in load_config(model).stored_blocks) // FILES
    command += ["--shard-bytes", str(shard)]
    written, started = 0, list[Cost]()
    for _ in range(rounds):
        started.append(cost([*command, "--dry-run"], limited_to(threads)))
    for _ in range(rounds):
        read_whole(source)
        quantized.append(cost(command, limited_to(threads)))
        written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        shutil.rmtree(output)
        read_whole(source)
        time.sleep(min(map(_wall, started)))
        copied.append(copy(source, output, written))
        output.unlink()
    total, seconds = (read + written) / 1e9, kernel_seconds(read, written)
    ours, plain, start = (min(costs, key=_wall) for costs in (quantized, copied, started))
    rest = Cost(ours.cpu - start.cpu, ours.wall - start.wall, 0, 0)
    kernels_alone = Cost(seconds, seconds / threads, 0, 0)
    rows = {
        "ms-quant": ours,
        "without starting": rest,
        "copying": plain,
        "the kernels alone": kernels_alone,
    }
    print(HEADER)
    for name, one in rows.items():
        rate = f"{total / one.wall * 1e3:.0f} | {total / one.cpu * 1e3:.0f}"
        print(f"| {name} | {total:.2f} | {one.wall:.2f} | {one.cpu:.2f} | {rate} |")
    bound, least = max(("copying", plain), ("the kernels", kernels_alone), key=_second_wall)
    share, times = [least.wall / one.wall for one in (ours, rest)], R1_OUTPUT / written * 1e9 / 3600
    print(f"\nThe lower bound is {bound}: ms-quant does {share[0]:.0%} of it, and {share[1]:.0%}")
    print(f"without starting. DeepSeek-R1 takes {times * rest.wall:.2f} hours at that rate, and")
    print(f"{times * least.wall:.2f} at the bound's; of one core it takes {times * rest.cpu:.2f}.")
    for name, costs in (("ms-quant", quantized), ("copying", copied), ("starting", started)):
        print(f"{name}, s of all rounds:", ", ".join(f"{one.wall:.2f}" for one in costs))


def _wall(one: Cost) -> float:
    return one.wall


def _second_wall(named: tuple[str, Cost]) -> float:
    return named[1].wall


def read_whole(paths: list[Path]) -> None:
    """Reads files, so that both sides find the same of them in the page cache."""
    buffer = bytearray(BLOCK)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def copy(source: list[Path], output: Path, written: int) -> Cost:
    """Reads all, and writes the first ``written`` bytes of it to the disk."""
    started, used = time.monotonic(), time.process_time()
    buffer, left = memoryview(bytearray(BLOCK)), written
    with output.open("wb", buffering=0) as target:
        for path in source:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    left -= target.write(buffer[: min(count, left)])
        os.fsync(target.fileno())
    return Cost(time.process_time() - used, time.monotonic() - started, 0, 0)


def kernel_seconds(read: int, written: int) -> float:
    """CPU seconds of one thread that rounds all weights from what is stored, and hashes the output;
    the source has two bytes or, in FP8, about as many as the output."""
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((ROWS, COLUMNS), np.float32)
    scales, codes = None, np.zeros(wide.shape, np.int8)
    stored = wide.astype(ml_dtypes.bfloat16)
    if read < 1.5 * written:
        stored = wide.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        scales = np.ones((ROWS, COLUMNS // WIDTH), np.float32)
    rounding = _least(lambda: kernels.quantize_stored(stored, scales, WIDTH, codes, threads=1))
    hashing = _least(lambda: hashlib.sha256(codes).digest())
    return rounding / codes.size * read / stored.itemsize + hashing / codes.size * written


def _least(work: Callable[[], object]) -> float:
    found = []
    for _ in range(20):
        started = time.thread_time()
        work()
        found.append(time.thread_time() - started)
    return min(found)
