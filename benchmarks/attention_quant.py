"""What quantized and sparse attention cost in accuracy, and for which kinds a rotation pays.

    python benchmarks/attention_quant.py [--qkv FILE.npz] [--rows 1024] [--seed 0]

Three tables, in Markdown: the error of the attention output with queries and keys quantized and
values float, without and with the rotation, for random data with the outliers that transformers
have; the error with all three quantized; and masks on planted heads. FILE.npz holds q, k and v,
(batch, heads, length, size), of a network of yours: then the first two tables are of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ms_quant.attention.dense import attention
from ms_quant.attention.fa_quant import (
    KINDS,
    QuantizedAttention,
    attend_quantized,
    quantize_operands,
)
from ms_quant.attention.grid import TokenGrid
from ms_quant.attention.operands import head_scales
from ms_quant.attention.rotation import rotate, walsh_rotation
from ms_quant.attention.rules import SparseRule, make_mask
from ms_quant.attention.sparse import attend

sys.path.append(str(Path(__file__).parent.parent / "tests" / "helpers"))
from slow_attention import planted_heads

SIZE = 128
SHAPE = (16, 16, 16)
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
RULES = {
    "rf_v1, arm2": SparseRule("rf_v1", 0.5, mode="arm2"),
    "rf_v1, arm3": SparseRule("rf_v1", 0.5, mode="arm3"),
    "rf_v1, best": SparseRule("rf_v1", 0.5),
    "rf_v3 0.5": SparseRule("rf_v3", 0.5),
    "rf_v3 0.8": SparseRule("rf_v3", 0.8),
    "time_blocks 0.5": SparseRule("time_blocks", 0.5),
    "time_blocks 0.8": SparseRule("time_blocks", 0.8),
    "ada_bsa 0.5": SparseRule("ada_bsa", 0.5, cdf_threshold=0.95),
}


def relative(x: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def cases(rows: int, seed: int) -> Iterator[tuple[str, Arrays]]:
    """Random queries, keys and values, and with one kind of outlier each."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, 1, 4, rows, SIZE), np.float32)
    channel = np.arange(SIZE)
    yield "plain Gaussian", (q, k, v)
    factor = np.where(channel == 5, np.float32(30), np.float32(1))
    yield "a channel of k x 30, of q / 30", (q / factor, k * factor, v)
    yield (
        "20 and -20 added to two channels of k",
        (q, k + 20 * (channel == 5) - 20 * (channel == 70), v),
    )
    yield "a channel of k x 8", (q, k * np.where(channel == 5, np.float32(8), np.float32(1)), v)
    one = (np.arange(rows) == 3)[:, None]
    yield "a token of k x 20", (q, k * np.where(one, np.float32(20), np.float32(1)), v)


def own(path: Path) -> Iterator[tuple[str, Arrays]]:
    with np.load(path) as file:
        yield path.name, (file["q"], file["k"], file["v"])


def quantized(arrays: Arrays, kind: str, rotation: np.ndarray | None) -> QuantizedAttention:
    q, k = rotate(arrays[0], rotation), rotate(arrays[1], rotation)
    scales = (head_scales(q), head_scales(k), head_scales(arrays[2])) if kind == "INT8" else None
    return quantize_operands(*arrays, rotation, rotation, kind, scales=scales)


def errors_of_qk(arrays: Arrays, kind: str, reference: np.ndarray) -> tuple[float, float]:
    """Without and with the rotation; values stay float."""
    found = []
    for rotation in (None, walsh_rotation(arrays[0].shape[3])):
        made = quantized(arrays, kind, rotation)
        found.append(relative(attention(made.q.values(), made.k.values(), arrays[2]), reference))
    return found[0], found[1]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def rotations(data: Sequence[tuple[str, Arrays]]) -> None:
    print("Relative L2 error of the output, q and k quantized, without -> with the rotation\n")
    rows = []
    for name, arrays in data:
        reference = attention(*arrays)
        pairs = (errors_of_qk(arrays, kind, reference) for kind in KINDS)
        rows.append([name, *(f"{plain:.4f} -> {turned:.4f}" for plain, turned in pairs)])
    table(["case", *KINDS], rows)


def all_quantized(data: Sequence[tuple[str, Arrays]]) -> None:
    print("Relative L2 error of the output, q, k and v quantized, no rotation; with P in e4m3\n")
    rows = []
    for name, arrays in data:
        reference = attention(*arrays)
        cells = [name]
        for kind in KINDS:
            made = quantized(arrays, kind, None)
            plain, rounded = (
                relative(attend_quantized(made, p_e4m3=e4m3), reference) for e4m3 in (False, True)
            )
            cells.append(f"{plain:.4f}; {rounded:.4f}")
        rows.append(cells)
    table(["case", *KINDS], rows)


def masks(seed: int) -> None:
    print(
        f"Masks on planted heads, {' x '.join(map(str, SHAPE))} tokens: density and relative L2\n"
    )
    q, k = planted_heads(SHAPE, seed=seed)
    v = np.random.default_rng(seed).standard_normal(q.shape, np.float32)
    grid = TokenGrid.of(SHAPE, q.shape[2])
    reference = attention(q, k, v)
    rows = []
    for name, rule in RULES.items():
        start = time.process_time()
        mask = make_mask(rule, q, k, grid)
        spent, density = time.process_time() - start, mask.density()[0]
        out = attend(q, k, v, mask)
        cells = [
            f"{mask.names[h]} {density[h]:.3f}: {relative(out[:, h], reference[:, h]):.4f}"
            for h in range(4)
        ]
        rows.append([name, *cells, f"{1000 * spent:.0f} ms"])
    table(["rule", "spatial", "temporal", "textural", "uniform", "mask, CPU"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--qkv", type=Path, help="q, k and v of a network, .npz")
    parser.add_argument("--rows", type=int, default=1024, help="tokens of the random data")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = list(own(args.qkv) if args.qkv else cases(args.rows, args.seed))
    rotations(data)
    all_quantized(data)
    if not args.qkv:
        masks(args.seed)


if __name__ == "__main__":
    main()
