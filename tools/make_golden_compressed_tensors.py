"""Writes tests/golden/compressed_tensors/library.json with the compressed-tensors library.

Needs torch and compressed-tensors. Weights, scales and zero points are formulas that
tests/checkpoint/test_compressed_tensors_golden.py repeats; what the library makes of them is
stored: the bytes of its tensors, and one row of what it reads back from them.

    python tools/make_golden_compressed_tensors.py tests/golden/compressed_tensors/library.json
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

ROWS, COLUMNS, ROW = 16, 64, 3  # fewer rows: the library cannot view one word of zero points
CASES: dict[str, dict[str, Any]] = {
    "W4A16 per group": {"num_bits": 4, "symmetric": True, "group_size": 32},
    "W4A16 per group, asymmetric": {"num_bits": 4, "symmetric": False, "group_size": 32},
    "W4A16 per channel, asymmetric": {"num_bits": 4, "symmetric": False},
    "W8A16 per channel": {"num_bits": 8, "symmetric": True},
    "W8A16 per group, asymmetric": {"num_bits": 8, "symmetric": False, "group_size": 32},
    "W8A8": {"num_bits": 8, "symmetric": True},
}
INPUTS = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}


def grid(rows: int, columns: int, formula: Any) -> torch.Tensor:
    return torch.tensor([[formula(i, j) for j in range(columns)] for i in range(rows)])


def case(name: str, given: dict[str, Any]) -> dict[str, Any]:
    bits, size = given["num_bits"], given.get("group_size")
    strategy = "group" if size else "channel"
    weights = {"type": "int", "strategy": strategy, "dynamic": False, **given}
    plain = name == "W8A8"
    format = "int-quantized" if plain else "pack-quantized"
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=INPUTS if plain else None,
        format=format,
    )
    groups = COLUMNS // size if size else 1
    levels, half = 1 << bits, 1 << (bits - 1)
    state = {
        "weight": grid(ROWS, COLUMNS, lambda i, j: ((37 * i + 11 * j) % 97 - 48) / 32),
        "weight_scale": grid(ROWS, groups, lambda i, g: (8 + (3 * i + 5 * g) % 8) / (4 * levels)),
    }
    if not given["symmetric"]:
        points = grid(ROWS, groups, lambda i, g: (37 * i + 11 * g) % levels - half)
        state["weight_zero_point"] = points.to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(state, scheme)
    back = compressor.decompress(stored, scheme)["weight"]
    found: dict[str, Any] = {
        key: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "bytes": tensor.contiguous().numpy().tobytes().hex(),
        }
        for key, tensor in stored.items()
        if key != "weight_scale"
    }
    row = f"row {ROW} read back"
    return {"weights": scheme.weights.model_dump(), "tensors": found, row: back[ROW].tolist()}


def inputs() -> dict[str, Any]:
    """Codes of a static input, and the values that they stand for."""
    args = QuantizationScheme(targets=["Linear"], input_activations=INPUTS).input_activations
    x = torch.tensor([[(29 * j % 64 - 32) / 8 for j in range(24)]])
    by = torch.tensor([3 / 128]), torch.tensor([-37], dtype=torch.int8)
    codes = quantize(x, *by, args, dtype=torch.int8)
    return {"codes": codes[0].tolist(), "values": dequantize(codes, *by, args)[0].tolist()}


def main() -> None:
    library = f"compressed-tensors {version('compressed-tensors')}"
    made = {"made by": library, **{name: case(name, given) for name, given in CASES.items()}}
    made["static input"] = inputs()
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in made.items()]
    Path(sys.argv[1]).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
