"""Block-sparse attention on CPU beside dense attention, ours and, if it is installed, PyTorch's.

    python benchmarks/sparse_attention.py [--tokens 4096] [--rounds 9] [--threads 1] [--isa NAME]

All contenders are called in turn, round after round, and the least CPU seconds and seconds count.
Speed-ups are over the best dense attention of the run; ``of ideal`` is the speed-up times the
density, 1 where a block that is left out costs nothing. Blocks are 128 by 128, random, about as
many in each row. The first table keeps 8 blocks in each row while tokens grow: seconds and bytes
should grow as tokens do. The last one has whole calls: a rule makes its mask, and attention follows
in the order of the mask, over numbers as given or quantized.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np

from ms_quant import kernels
from ms_quant.attention import computing
from ms_quant.attention.fa_quant import decoded
from ms_quant.attention.grid import TokenGrid
from ms_quant.attention.rules import SparseRule, make_mask
from ms_quant.attention.sparse import attend
from ms_quant.kernels import Codes, block_attention
from ms_quant.numerics.minifloat import E4M3, encode

DENSITIES = (0.5, 0.25, 0.2, 0.125)
BLOCK = 128
GROWING = (4096, 8192, 16384, 32768)
KEPT = 8  # blocks of a row, whatever the number of tokens
Calls = dict[str, Callable[[], object]]


def some_blocks(tokens: int, heads: int, density: float) -> np.ndarray:
    """In each row so many that all rows above it together have the density."""
    rng = np.random.default_rng(0)
    count = -(-tokens // BLOCK)
    until = np.rint(np.arange(count + 1) * density * count)
    order = rng.random((1, heads, count, count)).argsort(axis=-1).argsort(axis=-1)
    return (order < np.diff(until)[:, None]).astype(np.uint8)


def seconds(calls: Calls, rounds: int) -> dict[str, tuple[float, float]]:
    """The least CPU seconds and seconds; the first round warms up."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, run in calls.items():
            start = time.process_time(), time.perf_counter()
            run()
            found[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return {
        name: (min(cpu for cpu, _ in each[1:]), min(wall for _, wall in each[1:]))
        for name, each in found.items()
    }


def codes(x: np.ndarray, dtype: type, rows: int) -> Codes:
    """One scale for all, as time does not depend on it."""
    batch, heads, tokens, size = x.shape
    scale = np.abs(x).max() / (127 if dtype == np.int8 else 448)
    shape = (batch, heads, -(-tokens // rows), -(-size // 128))
    made = np.rint(x / scale).astype(dtype) if dtype == np.int8 else encode(x / scale, E4M3)
    return Codes(made, np.full(shape, scale, np.float32), (rows, 128))


def dense_calls(q, k, v, scale: float, threads: int, isa: str | None) -> Calls:
    shared = {"threads": threads, "isa": isa}
    mask = np.zeros((1, q.shape[2], k.shape[2]), np.float32)
    calls: Calls = {
        "dense": lambda: block_attention(q, k, v, scale=scale, **shared),
        "dense with an additive mask": lambda: kernels.attention(q, k, v, mask, scale, **shared),
    }
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: left out")
        return calls
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention
    calls[f"dense of PyTorch {torch.__version__}"] = lambda: attend(*tensors, scale=scale)
    return calls


def compare(tokens: int, heads: int, size: int, options: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, tokens, size), np.float32) for _ in range(3))
    scale, shared = size**-0.5, {"threads": options.threads, "isa": options.isa}
    calls = dense_calls(q, k, v, scale, options.threads, options.isa)
    names_of_dense = tuple(calls)
    bytes_of = [codes(q, np.int8, 128), codes(k, np.int8, 128)]
    kinds = {
        "int8 q, k": (*bytes_of, v),
        "int8 q, k, FP8 v": (*bytes_of, codes(v, np.uint8, 256)),
        "FP8": (codes(q, np.uint8, 128), codes(k, np.uint8, 256), codes(v, np.uint8, 256)),
    }
    for name, operands in kinds.items():
        calls[name] = lambda o=operands: block_attention(*o, scale=scale, **shared)
    densities = dict.fromkeys(calls, 1.0)
    for density in DENSITIES:
        blocks = some_blocks(tokens, heads, density)
        for kind, operands in {"": (q, k, v), ", int8 q, k": kinds["int8 q, k"]}.items():
            name = f"density {density}{kind}"
            densities[name] = float(blocks.mean())
            calls[name] = lambda o=operands, b=blocks: block_attention(
                *o, scale=scale, blocks=b, **shared
            )
    found = seconds(calls, options.rounds)
    best = min(found[name][0] for name in names_of_dense)
    print(f"\n{tokens} tokens, {heads} heads of {size}\n")
    print("| attention | density | CPU s | s | times the best dense | of ideal |")
    print("|---|---|---|---|---|---|")
    for name, (cpu, wall) in found.items():
        times, density = best / cpu, densities[name]
        row = f"{density:.4g} | {cpu:.4f} | {wall:.4f} | {times:.2f} | {times * density:.3f}"
        print(f"| {name} | {row} |")


def whole_calls(tokens: int, heads: int, size: int, options: argparse.Namespace) -> None:
    """Masks and attention by rules; a first frame is not kept whole, so that densities are low."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, tokens, size), np.float32) for _ in range(3))
    shared = {"threads": options.threads, "isa": options.isa}
    grid = TokenGrid.of((tokens // 256, 16, 16), tokens)

    def kernel(*operands, **rest):
        return computing.block_attention(*operands, **rest, **shared)

    rules = {
        f"rf_v3 {1 - d:g}": SparseRule("rf_v3", 1 - d, protect_first_frame=False) for d in DENSITIES
    }
    rules["time_blocks 0.875"] = SparseRule("time_blocks", 0.875, protect_first_frame=False)
    rules["ada_bsa 0.5"] = SparseRule("ada_bsa", 0.5)
    rules["rf_v1 0.5, arm2"] = SparseRule("rf_v1", 0.5, mode="arm2")
    masks = {name: make_mask(rule, q, k, grid) for name, rule in rules.items()}
    calls: Calls = {"dense": lambda: kernel(q, k, v)}
    for name, rule in rules.items():
        calls[f"mask {name}"] = lambda r=rule: make_mask(r, q, k, grid)
        calls[name] = lambda m=masks[name]: attend(q, k, v, m, kernel=kernel)
    last = f"rf_v3 {1 - DENSITIES[-1]:g}"
    for kind in ("FP8_DYNAMIC", "INT8_DYNAMIC", "MIX"):
        masks[f"{last}, {kind}"] = masks[last]
        calls[f"mask {last}, {kind}"] = calls[f"mask {last}"]
        prepare = decoded(kind)
        calls[f"{last}, {kind}"] = lambda p=prepare: attend(
            q, k, v, masks[last], kernel=kernel, prepare=p
        )
    found = seconds(calls, options.rounds)
    dense = found["dense"]
    print(f"\n{tokens} tokens, {heads} heads of {size}, whole calls; dense {dense[0]:.4f} CPU s\n")
    print(
        "| rule | density | mask, of dense | CPU s | times dense | of ideal | the same of seconds |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, mask in masks.items():
        density = float(mask.density().mean())
        made, called = found[f"mask {name}"], found[name]
        times = [dense[i] / (made[i] + called[i]) for i in range(2)]
        print(
            f"| {name} | {density:.3f} | {made[0] / dense[0]:.3f} | {made[0] + called[0]:.4f} | "
            f"{times[0]:.2f} | {times[0] * density:.3f} | {times[1] * density:.3f} |"
        )


def grown(tokens: int, size: int, options: argparse.Namespace) -> tuple[float, float, float]:
    """CPU seconds; and MB: how much higher the process's peak got, and of all operands."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, tokens, size), np.float32) for _ in range(3))
    shared = {"scale": size**-0.5, "threads": options.threads, "isa": options.isa}
    blocks = some_blocks(tokens, 1, KEPT * BLOCK / tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls: Calls = {"": lambda: block_attention(q, k, v, blocks=blocks, **shared)}
    cpu = seconds(calls, options.rounds)[""][0]
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return cpu, more, 4 * q.nbytes / 2**20


def grow(size: int, options: argparse.Namespace) -> None:
    print(f"\n{KEPT} blocks in each row, 1 head of {size}\n")
    print("| tokens | CPU s | microseconds a token | peak is higher by, MB | q, k, v, y, MB |")
    print("|---|---|---|---|---|")
    for tokens in GROWING:
        cpu, more, held = grown(tokens, size, options)
        print(f"| {tokens} | {cpu:.4f} | {cpu / tokens * 1e6:.2f} | {more:.1f} | {held:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", choices=tuple(kernels.ISAS))
    options = parser.parse_args()
    print(f"{options.isa or kernels.best_isa()}, {options.threads} threads")
    grow(options.size, options)
    compare(options.tokens, options.heads, options.size, options)
    whole_calls(options.tokens, options.heads, options.size, options)


if __name__ == "__main__":
    main()
