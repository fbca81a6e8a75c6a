"""A network of several kinds of layers, quantized in every way; also run as a process of its own.

python whole_networks.py DIRECTORY saves, or, with what it saved there, loads and compares
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn

import ms_quant
from ms_quant.schemes.table import SCHEMES
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig

WIDTH, TOKENS = 128, 12
OPTIONS: dict[str, dict[str, Any]] = {
    "W4A16": {"group_size": 32, "symmetric": False},
    "W4A4_MXFP4_SVD": {"rank": 2},
    "W4A4_FLATQUANT_DYNAMIC": {"steps": 2},
    "W16A16S": {"sparsity": 0.2},
    "W8A8": {"algorithm": "osl"},
    "W8A8_DYNAMIC": {"algorithm": "smoothquant"},
}
SEVERAL = ("W8A8", "W4A16", "W8A8_MXFP8", "W8A8FP8_DYNAMIC")


class Net(nn.Cell):
    """An embedding, a convolution, norms, linears of both kinds, one of them in two places."""

    def __init__(self, seed: int):
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, has_bias=True)
        self.norm = nn.LayerNorm([WIDTH])
        self.up = nn.Dense(WIDTH, 2 * WIDTH)
        self.down = mint.nn.Linear(2 * WIDTH, WIDTH)
        self.gate = nn.Dense(WIDTH, WIDTH)
        self.again = self.gate
        self.head = nn.Dense(WIDTH, 3)
        self.register_buffer("scale", Tensor(np.full(3, 1 + seed, np.float32)))
        rng = np.random.default_rng(seed)
        for parameter in self.get_parameters():
            parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype("f4") / 4))

    def construct(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.convolution(x.swapaxes(1, 2)).swapaxes(1, 2)
        x = x + self.down(self.up(self.norm(x)))
        x = self.again(self.gate(x))
        return self.head(x) * self.scale


def inputs() -> Tensor:
    return Tensor(np.random.default_rng(5).integers(0, TOKENS, (2, 7)).astype(np.int32))


def policy_of(scheme: str) -> TimestepPolicyConfig | None:
    if scheme != "W8A8_TIMESTEP":
        return None
    policy = TimestepPolicyConfig("dynamic")
    policy.register(1, "static", "w8a8_static_linear")
    return policy


def calibration():
    for step in range(2):
        TimestepManager.set_timestep_idx(step)
        yield inputs()


def quantized(scheme: str, seed: int = 0) -> nn.Cell:
    return ms_quant.quantize(
        Net(seed),
        scheme,
        calibration=calibration(),
        exclude=["head"],
        timestep_policy=policy_of(scheme),
        **OPTIONS.get(scheme, {}),
    )


def compiles(scheme: str) -> bool:
    """Whether nothing asks NumPy, or the timestep, in each call."""
    others = ("W8A8_TIMESTEP", "W4A4_FLATQUANT_DYNAMIC", "W8A8FP8_DYNAMIC", "W8A8FP8_BLOCK")
    return scheme not in others and "MXFP" not in scheme


def outputs(network: nn.Cell, scheme: str) -> dict[str, np.ndarray]:
    found = {"pynative": network(inputs()).asnumpy()}
    if compiles(scheme):
        found["jit"] = ms.jit(network.construct)(inputs()).asnumpy()
        ms.set_context(mode=ms.GRAPH_MODE)
        found["graph"] = network(inputs()).asnumpy()
        ms.set_context(mode=ms.PYNATIVE_MODE)
    return found


def save(directory: Path) -> None:
    for scheme in SEVERAL:
        network, folder = quantized(scheme), directory / scheme
        ms_quant.save_quantized(network, folder, format="network")
        ms.save_checkpoint(network, str(folder / "network.ckpt"))
        ms.save_checkpoint(network, str(folder / "network"), format="safetensors")
        np.savez(folder / "outputs.npz", **outputs(network, scheme))


def load(directory: Path) -> None:
    for scheme in SEVERAL:
        folder = directory / scheme
        expected = dict(np.load(folder / "outputs.npz"))
        whole = folder / "quantized_network.safetensors"
        ways = {"whole": ms_quant.quantize(Net(1), whole)}
        for name, format in (("network.ckpt", "ckpt"), ("network.safetensors", "safetensors")):
            network = quantized(scheme, 1)
            network(inputs())  # so that linears are packed; what jit has compiled, MindSpore's own
            # layers among it, goes on with the memory that parameters had before a load
            held = ms.load_checkpoint(str(folder / name), format=format)
            assert ms.load_param_into_net(network, held, strict_load=True) == ([], [])
            network.scale.assign_value(ways["whole"].scale)  # MindSpore saves no buffers
            ways[name] = network
        for name, network in ways.items():
            found = outputs(network, scheme)
            assert set(found) == set(expected)
            for mode, y in found.items():
                np.testing.assert_array_equal(y, expected[mode], f"{scheme} {name} {mode}")
        print(scheme, *ways)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    load(target) if target.exists() else save(target)
    assert set(SEVERAL) <= set(SCHEMES)
