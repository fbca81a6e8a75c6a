"""Speed and ratio of the UNZIP codec against zstd and the entropy bound, on one core.

    python benchmarks/unzip.py [--mib 16] [--repeat 5] [--threads 1]

Gaussian int8 weights (sigma 12, rounded) of which a share is set to zero at random, in tiles of
32 KiB, low mode. MB/s are those of raw weights, the best of several repetitions taken in turn;
the bound is the order-0 entropy of the bytes. zstd (level 3, one thread) where the ``zstandard``
package is installed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from sparse_compress.codec import backend_name, decode_tiles, encode_tiles

TILE = 32768
SIGMA = 12
SHARES = (0.0, 0.5, 0.7)


def weights(size: int, zeros: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = np.clip(np.rint(rng.normal(0, SIGMA, size)), -127, 127).astype(np.int8)
    values[rng.random(size) < zeros] = 0
    return values.view(np.uint8)


def entropy(data: np.ndarray) -> float:
    """Order-0 entropy as a share of 8 bits."""
    share = np.bincount(data, minlength=256) / data.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum() / 8)


def coders(
    data: np.ndarray, threads: int
) -> dict[str, tuple[Callable[[], int], Callable[[], np.ndarray]]]:
    """Name to (encode, giving the stored bytes; decode, giving the raw ones)."""
    weight, index = encode_tiles(data, TILE, threads=threads)
    found: dict[str, tuple[Callable[[], int], Callable[[], np.ndarray]]] = {
        f"UNZIP, {backend_name()}": (
            lambda: encode_tiles(data, TILE, threads=threads)[0].size,
            lambda: decode_tiles(weight, index, TILE, threads=threads),
        )
    }
    try:
        import zstandard
    except ImportError:
        return found
    packer, unpacker = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    packed = packer.compress(data.tobytes())
    found["zstd -3"] = (
        lambda: len(packer.compress(data)),
        lambda: np.frombuffer(unpacker.decompress(packed), np.uint8),
    )
    return found


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print("| zeros | coder | encode, MB/s | decode, MB/s | stored/raw | entropy bound |")
    print("|---|---|---|---|---|---|")
    for zeros in SHARES:
        data = weights(args.mib << 20, zeros)
        made = coders(data, args.threads)
        best = {name: [np.inf, np.inf] for name in made}
        for _ in range(args.repeat):
            for name, calls in made.items():
                best[name] = [min(b, seconds(c)) for b, c in zip(best[name], calls, strict=True)]
        for name, (write, read) in made.items():
            assert np.array_equal(read(), data)
            speeds = " | ".join(f"{data.size / 1e6 / s:.0f}" for s in best[name])
            print(
                f"| {zeros:.0%} | {name} | {speeds} | {write() / data.size:.3f} | "
                f"{entropy(data):.3f} |"
            )


if __name__ == "__main__":
    main()
