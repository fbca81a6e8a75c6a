"""Quantized linears on CPU beside MindSpore's Dense, NumPy and, if it is installed, PyTorch.

    python benchmarks/linear.py [--rounds 7] [--json FILE]

Each row of the table is a number of tokens M and a weight (N, K); all contenders are timed in turn,
round after round, and the best round counts. *cold*, of one token: each call takes another copy of
the weight, as many as fill four times the last-level cache (2 GiB at most), as a model's layers do;
*warm*: the same weight again and again. ``of VNNI`` and ``of AMX`` are the shares of the products
of int8 that the processor's cores do with each, ``of read`` the share of the bytes that they read
a second from memory, all measured between the rounds (benchmarks/peak.cpp; needs a C++ compiler and
AVX-512 VNNI). The read share of *cold* is the median of rounds, each beside a reading of its own:
what a shared machine reads changes from second to second.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant import kernels
from ms_quant.cells import QuantLinear
from ms_quant.cells.direct import threads
from ms_quant.cli.console import use_mindspore
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.schemes.table import get_scheme

ROWS = (1, 8, 64, 512)
SHAPES = ((2048, 2048), (4096, 11008), (11008, 4096))  # K, N
SCHEMES: dict[str, dict[str, Any]] = {
    "W8A8_DYNAMIC": {},
    "W8A16": {},
    "W4A16": {"group_size": 128},
    "W4A8_DYNAMIC": {},
}
MOST_COPIES = 2 << 30
MOST_TOGETHER = 8 << 30  # bytes of copies of all contenders, which are then called in turn
COLD_CALLS = 24  # in a round at least
SETTLE = 0.02  # seconds after which the threads of the contender before no longer spin
PEAK = Path(__file__).with_name("peak.cpp")
Make = Callable[
    [np.ndarray, int], tuple[list[Callable[[Any], Any]], Callable[[np.ndarray], Any], int]
]
"""A weight (N, K) and a count to as many linears, each with a copy of its own; what makes their
input of float32 (M, K); and the bytes of one copy."""


def dense(weight: np.ndarray, count: int):
    import mindspore as ms
    from mindspore import nn

    cells = []
    for _ in range(count):
        cell = nn.Dense(weight.shape[1], weight.shape[0], has_bias=False, weight_init="zeros")
        cell.weight.set_data(ms.Tensor(weight.copy()))
        cells.append(cell)
    return cells, ms.Tensor, weight.nbytes


def quantized(name: str, options: dict[str, Any]) -> Make:
    from mindspore import Tensor

    scheme = get_scheme(name, **options)

    def make(weight: np.ndarray, count: int):
        grid = scheme.weight.fit(weight, "weight")
        activation = scheme.activation.fit(None, None)
        cell = QuantLinear(QuantizedLinear(grid.round(weight), grid, None, activation))
        assert cell.native is not None
        cells = [cell, *(copy.deepcopy(cell) for _ in range(count - 1))]
        one = Tensor(np.zeros((1, weight.shape[1]), np.float32))
        for each in cells:
            each(one)  # packs
        return cells, Tensor, cell.native.watched.packed_bytes

    return make


def in_numpy(weight: np.ndarray, count: int):
    copies = [weight.copy() for _ in range(count)]
    calls = [lambda x, own=own: x @ own.T for own in copies]
    return calls, np.ascontiguousarray, weight.nbytes


def in_torch(kind: str) -> Make:
    import torch

    torch.set_num_threads(threads())
    torch.set_grad_enabled(False)

    def make(weight: np.ndarray, count: int):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.copy_(torch.from_numpy(weight))
        size, to_input = weight.nbytes, torch.from_numpy
        if kind == "bfloat16":
            linear, size = linear.to(torch.bfloat16), size // 2
            to_input = lambda x: torch.from_numpy(x).to(torch.bfloat16)  # noqa: E731
        if kind == "int8":
            holder = torch.nn.Sequential(linear)
            linear = torch.ao.quantization.quantize_dynamic(holder, {torch.nn.Linear})[0]
            size //= 4
        return [copy.deepcopy(linear) for _ in range(count)], to_input, size

    return make


def contenders() -> dict[str, Make]:
    found: dict[str, Make] = {"MindSpore nn.Dense": dense, "NumPy": in_numpy}
    try:
        found |= {f"PyTorch {kind}": in_torch(kind) for kind in ("float32", "bfloat16", "int8")}
    except ImportError:
        print("PyTorch is not installed: left out")
    return found | {name: quantized(name, options) for name, options in SCHEMES.items()}


def last_level_cache() -> int:
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes]
    return max(found, default=32 << 20)


class Machine:
    """What the processor reaches; zeros where it cannot be measured."""

    def __init__(self, directory: Path):
        self.library, self.peak, self.amx, self.read = None, 0.0, 0.0, 0.0
        compiler = shutil.which("c++")
        if compiler is None or not kernels.has_isa("avx512_vnni"):
            return
        flags = ["-O3", "-mavx512f", "-mavx512bw", "-mavx512vnni", "-shared", "-fPIC", "-w"]
        if kernels.has_isa("amx"):  # asking for it also allows it to this process
            flags += ["-mamx-tile", "-mamx-int8", "-mamx-bf16", "-DWITH_AMX"]
        path = directory / "peak.so"
        subprocess.run([compiler, *flags, str(PEAK), "-o", str(path)], check=True)
        self.library = ctypes.CDLL(str(path))
        self.buffer = np.ones(MOST_COPIES, np.uint8)

    def measure(self) -> None:
        """Keeps the best of what was measured so far."""
        if self.library is None:
            return
        self.peak = max(self.peak, self._products("vnni_products", 500_000 * 16 * 64, 500_000))
        if kernels.has_isa("amx"):
            self.amx = max(self.amx, self._products("amx_products", 500_000 * 4 * 16384, 500_000))
        self.read_now()

    def read_now(self) -> float:
        """Bytes a second at this moment; the most that it ever was is kept."""
        if self.library is None:
            return 0.0
        count, part = threads(), MOST_COPIES // threads() // 512 * 512
        start = self.buffer.ctypes.data
        read, size = self.library.read_bytes, ctypes.c_int64(part)
        seconds = _at_once(lambda i: read(ctypes.c_void_p(start + i * part), size), count)
        self.read = max(self.read, count * part / seconds)
        return count * part / seconds

    def _products(self, name: str, products: int, rounds: int) -> float:
        """A second, of all threads, when each does so many in that many rounds."""
        work = getattr(self.library, name)
        seconds = _at_once(lambda index: work(ctypes.c_int64(rounds)), threads())
        return threads() * products / seconds


def _at_once(work: Callable[[int], Any], count: int) -> float:
    workers = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - started


def best_times(
    makes: dict[str, Make],
    rows: int,
    shape: tuple[int, int],
    rounds: int,
    cold: bool,
    machine: Machine,
) -> dict[str, tuple[float, int, float]]:
    """Contender to its best seconds, its weight's bytes and, if cold, its share of reading."""
    into, out = shape
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((out, into), np.float32)
    x = rng.standard_normal((rows, into), np.float32)
    wanted, made = min(4 * last_level_cache(), MOST_COPIES), {}
    for name, make in makes.items():
        size = make(weight, 1)[2] if cold else wanted
        calls, to_input, size = make(weight, -(-wanted // size))
        made[name] = calls, to_input(x), size
    best = dict.fromkeys(makes, float("inf"))
    shares: dict[str, list[float]] = {name: [] for name in makes}
    for _ in range(rounds):
        for name, (calls, tokens, size) in made.items():
            time.sleep(SETTLE)
            calls[-1](tokens)
            count = max(len(calls), COLD_CALLS) if cold else _repeats(rows, shape)
            started = time.perf_counter()
            for index in range(count):
                calls[index % len(calls)](tokens)
            seconds = (time.perf_counter() - started) / count
            best[name] = min(best[name], seconds)
            reading = machine.read_now() if cold else 0.0
            shares[name].append(size / seconds / reading if reading else 0.0)
    return {name: (best[name], made[name][2], float(np.median(shares[name]))) for name in makes}


def _repeats(rows: int, shape: tuple[int, int]) -> int:
    return max(1, int(2e9 / (2 * rows * shape[0] * shape[1])))


def table(rows: list[dict[str, Any]], machine: Machine) -> list[str]:
    lines = [
        f"VNNI peak {2 * machine.peak / 1e12:.2f} TOPS, "
        f"AMX peak {2 * machine.amx / 1e12:.2f} TOPS, "
        f"reading {machine.read / 1e9:.1f} GB/s, "
        f"{threads()} threads, {kernels.best_isa()}.",
        "",
        "| M | K | N | contender | warm ms | x Dense | cold ms | x Dense "
        "| of VNNI | of AMX | of read |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["M"], row["K"], row["N"], row["name"]]
        for which in ("warm", "cold"):
            seconds, base = row[which], row[f"{which}_dense"]
            cells += [f"{1e3 * seconds:.3f}", f"{base / seconds:.2f}"] if seconds else ["", ""]
        products, seconds = row["M"] * row["K"] * row["N"], row["cold"] or row["warm"]
        for peak in (machine.peak, machine.amx):
            cells.append(f"{products / seconds / peak:.2f}" if peak else "")
        share = row["share"] or (machine.read and row["bytes"] / seconds / machine.read)
        cells.append(f"{share:.2f}" if share else "")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the numbers")
    arguments = parser.parse_args()
    use_mindspore()
    makes, rows = contenders(), []
    with tempfile.TemporaryDirectory() as directory:
        machine = Machine(Path(directory))
        for shape in SHAPES:
            for count in ROWS:
                machine.measure()
                sizes = count, shape, arguments.rounds
                warm = best_times(makes, *sizes, False, machine)
                cold = {}
                if count == ROWS[0]:
                    copies = min(4 * last_level_cache(), MOST_COPIES)
                    if len(makes) * copies <= MOST_TOGETHER:
                        cold = best_times(makes, *sizes, True, machine)
                    else:  # one at a time: copies fill the memory
                        for name, make in makes.items():
                            cold |= best_times({name: make}, *sizes, True, machine)
                for name in makes:
                    row = {"M": count, "K": shape[0], "N": shape[1], "name": name}
                    row |= {"warm": warm[name][0], "warm_dense": warm["MindSpore nn.Dense"][0]}
                    row |= {"cold": cold[name][0] if cold else 0.0, "bytes": warm[name][1]}
                    row["cold_dense"] = cold["MindSpore nn.Dense"][0] if cold else 0.0
                    row["share"] = cold[name][2] if cold else 0.0
                    rows.append(row)
                print("\n".join(table(rows[-len(makes) :], machine)), flush=True)
    print("\n".join(table(rows, machine)))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
