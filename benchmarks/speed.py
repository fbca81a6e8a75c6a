"""How fast a model is quantized from its weights, beside what the machine could do.

Two bounds: copying, which reads the same bytes and writes as many as the output has, and the
kernels, the CPU time of one thread that only widens, rounds and hashes. Both sides of each round
begin with the source in the page cache, as far as memory goes, and end when what was written is on
the disk.
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

BLOCK = 4 << 20
ROWS, COLUMNS = 64, 7168
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
    written = 0
    for _ in range(rounds):
        read_whole(source)
        quantized.append(cost(command, limited_to(threads)))
        written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        shutil.rmtree(output)
        read_whole(source)
        copied.append(copy(source, output, written))
        output.unlink()
    total, seconds = (read + written) / 1e9, kernel_seconds(read, written)
    ours, plain = min(quantized, key=_wall), min(copied, key=_wall)
    print(HEADER)
    for name, one in (("ms-quant", ours), ("copying", plain)):
        rate = f"{total / one.wall * 1e3:.0f} | {total / one.cpu * 1e3:.0f}"
        print(f"| {name} | {total:.2f} | {one.wall:.1f} | {one.cpu:.1f} | {rate} |")
    rate = f"{total / seconds * threads * 1e3:.0f} | {total / seconds * 1e3:.0f}"
    print(f"| kernels alone | {total:.2f} | {seconds / threads:.1f} | {seconds:.1f} | {rate} |")
    kernel, least = seconds / threads, max(seconds / threads, plain.wall)
    bound = "copying" if plain.wall > kernel else "the kernels"
    share = least / ours.wall
    times = R1_OUTPUT / written * 1e9 / 3600
    print(f"\nThe lower bound is {bound}: ms-quant does {100 * share:.0f} % of it.")
    print(
        f"DeepSeek-R1 takes {times * ours.wall:.2f} hours at this rate, and {times * least:.2f} at"
    )
    print(f"the bound's; of one core it takes {times * ours.cpu:.2f} hours.")


def _wall(one: Cost) -> float:
    return one.wall


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
    """CPU seconds of one thread that makes float32 of all weights, rounds them, and hashes the
    output; the source has two bytes or, in FP8, about as many as the output."""
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((ROWS, COLUMNS), np.float32)
    stored = wide.astype(ml_dtypes.bfloat16 if read > 1.5 * written else ml_dtypes.float8_e4m3fn)
    count, codes = wide.size, np.zeros(wide.size, np.uint8)
    table = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)

    def widen() -> None:
        if stored.itemsize == 2:
            stored.astype(np.float32)
        else:
            np.take(table, stored.view(np.uint8), out=wide, mode="clip")

    rounding = _least(lambda: kernels.quantize_rows(wide, threads=1)) + _least(widen)
    hashing = _least(lambda: hashlib.sha256(codes).digest())
    return rounding / count * read / stored.itemsize + hashing / count * written


def _least(work: Callable[[], object]) -> float:
    found = []
    for _ in range(20):
        started = time.thread_time()
        work()
        found.append(time.thread_time() - started)
    return min(found)
