"""A network quantized as MindSpore Golden Stick's ``PTQConfig`` says.

    python examples/ptq_config.py

``from_ptq_config`` reads the public fields of a config, so Golden Stick need not be installed; here
a plain object has them. Attention gets 8-bit weights, the MLP 4-bit ones in groups, by a layer
policy as in Golden Stick, and what the blacklist names stays float.
"""

from __future__ import annotations

from types import SimpleNamespace

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

import ms_quant


def build() -> nn.Cell:
    """A network whose parts have names."""
    ms.set_seed(0)
    layers = {"attention": nn.Dense(64, 64), "mlp": nn.Dense(64, 64), "lm_head": nn.Dense(64, 16)}
    network = nn.SequentialCell()
    for name, layer in layers.items():
        network.insert_child_to_cell(name, layer)
    network.cell_list = list(layers.values())
    return network


def main() -> None:
    """Makes the recipe of a config and applies it."""
    ms.runtime.launch_blocking()  # on a CPU many times faster
    config = SimpleNamespace(
        weight_quant_dtype=ms.int8,
        act_quant_dtype=ms.int8,
        outliers_suppression="SMOOTH",
        opname_blacklist=["lm_head"],
    )
    mlp = SimpleNamespace(
        weight_quant_dtype="qint4x2",
        act_quant_dtype=None,
        weight_quant_granularity="PER_GROUP",
        group_size=64,
    )
    recipe = ms_quant.from_ptq_config(config, {"mlp": mlp})
    data = [Tensor(np.random.default_rng(0).normal(size=(128, 64)).astype(np.float32))]
    print(ms_quant.summary(ms_quant.quantize(build(), recipe, calibration=data)))


if __name__ == "__main__":
    main()
