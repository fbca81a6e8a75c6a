"""A MindSpore network: quantized without data, and with calibration; looked at, saved and loaded.

python examples/network.py [DIRECTORY]
"""

from __future__ import annotations

import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

import ms_quant


class Block(nn.Cell):
    """Self-attention and an MLP, as in any transformer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Dense(size, size) for _ in range(3))
        self.out, self.norm = nn.Dense(size, size), nn.LayerNorm((size,))
        self.up, self.down = nn.Dense(size, 4 * size), nn.Dense(4 * size, size)

    def construct(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        scores = ops.matmul(self.q(y), self.k(y).swapaxes(-1, -2)) / y.shape[-1] ** 0.5
        x = x + self.out(ops.matmul(ops.softmax(scores, -1), self.v(y)))
        return x + self.down(ops.relu(self.up(self.norm(x))))


class Network(nn.Cell):
    """Two blocks and a head."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.blocks = nn.CellList([Block(size) for _ in range(2)])
        self.head = nn.Dense(size, 10)

    def construct(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build() -> Network:
    """The network with the same values each time."""
    ms.set_seed(0)
    return Network()


def batches(count: int = 4):
    """Calibration data: any iterable of what the network is called with."""
    for seed in range(count):
        yield Tensor(np.random.default_rng(seed).normal(size=(4, 32, 64)).astype(np.float32))


def error(network: nn.Cell) -> float:
    """Relative error of the output."""
    x = Tensor(np.random.default_rng(99).normal(size=(4, 32, 64)).astype(np.float32))
    exact = build()(x).asnumpy()
    return float(np.linalg.norm(network(x).asnumpy() - exact) / np.linalg.norm(exact))


def main(directory: str) -> None:
    """Quantizes the network in three ways."""
    ms.runtime.launch_blocking()  # on a CPU many times faster
    dynamic = ms_quant.quantize(build(), "W8A8_DYNAMIC")
    print(f"without data    W8A8_DYNAMIC        error {error(dynamic):.4f}")

    observed = ms_quant.calibrate(build(), batches(), algorithm="osl")
    print(observed)
    static = ms_quant.quantize(build(), "W8A8", calibration=observed, algorithm="osl")
    print(f"calibrated      W8A8 osl            error {error(static):.4f}")

    mixed = ms_quant.quantize(
        build(),
        lambda path, cell: "W8A8_DYNAMIC" if path.endswith(("up", "down")) else "W8A16",
        exclude=["head"],
    )
    print(f"mixed           W8A8_DYNAMIC, W8A16 error {error(mixed):.4f}")
    print(ms_quant.summary(mixed))

    path = ms_quant.save_quantized(static, directory, format="network")
    again = ms_quant.load_quantized(build(), path)
    print(f"{path}: the same outputs: {error(again) == error(static)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "exported")
