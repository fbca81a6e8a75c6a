"""A twin of a checkpoint with outlier channels, that computes the same function.

    python tools/inject_outliers.py SOURCE TARGET [--channels 4 --factor 32 --seed 0]

In every block some channels of both norms are multiplied by a power of two, and the columns of the
linears that read them divided by it. Both are exact in any binary float type, so the float output
is the same bit for bit, while the activations get the outlier channels that large models have.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

import numpy as np

from ms_quant.files.companion_files import companion_files
from ms_quant.files.reader import Checkpoint
from ms_quant.files.writer import TensorPlan, write_file
from ms_quant.models.config import load_config
from ms_quant.models.names import block_prefix
from ms_quant.models.weights import check_model


def column_factors(source: Path, channels: int, factor: float, seed: int) -> dict[str, np.ndarray]:
    """Tensor name to what its last axis is multiplied by."""
    config, rng = load_config(source), np.random.default_rng(seed)
    if math.frexp(factor)[0] != 0.5:
        raise SystemExit(f"factor is {factor}, expected a power of two")
    factors = {}
    for block in config.blocks:
        for edge in block.edges:
            if not edge.norm:
                continue
            scale = np.ones(config.hidden_size, np.float32)
            scale[rng.choice(config.hidden_size, channels, replace=False)] = factor
            factors[f"{block_prefix(block.index)}{edge.producer}.weight"] = scale
            for member in block.readers(edge):
                factors[f"{block_prefix(block.index)}{member}.weight"] = 1 / scale
    return factors


def inject(source: Path, target: Path, channels: int = 4, factor: float = 32, seed: int = 0):
    """Writes the twin; see the module."""
    checkpoint = Checkpoint(source)
    check_model(checkpoint, load_config(source))
    factors = column_factors(source, channels, factor, seed)
    target.mkdir(parents=True)

    def get(plan: TensorPlan) -> np.ndarray:
        stored = checkpoint.read(plan.name)
        if plan.name not in factors:
            return stored
        return (stored.astype(np.float32) * factors[plan.name]).astype(stored.dtype)

    infos = {name: checkpoint.info(name) for name in checkpoint.names}
    plans = [TensorPlan(name, info.dtype, info.shape) for name, info in infos.items()]
    write_file(target / "model.safetensors", plans, get)
    for name in ("config.json", *companion_files(source)):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--factor", type=float, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    inject(args.source, args.target, args.channels, args.factor, args.seed)


if __name__ == "__main__":
    main()
