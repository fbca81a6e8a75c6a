"""Models stored in FP8, and what they stand for, by plain loops over the definition."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

PATH = Path(__file__).parents[2] / "tools" / "make_fp8_source.py"
_spec = importlib.util.spec_from_file_location("make_fp8_source", PATH)
assert _spec is not None and _spec.loader is not None
maker = importlib.util.module_from_spec(_spec)
sys.modules["make_fp8_source"] = maker  # which its dataclasses look for
_spec.loader.exec_module(maker)

Tensors = dict[str, np.ndarray]
KIMI: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    ],
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
}
"""``quantization_config`` as Kimi-K2-Thinking's config.json has it."""


def value_of(code: int) -> float:
    """The number that an e4m3 code stands for: a sign, four bits of exponent, three of mantissa."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def scale_of(stored: np.ndarray) -> np.ndarray:
    """Scales in float32; bytes are exponents of E8M0."""
    if stored.dtype.itemsize == 1:
        return np.ldexp(np.float32(1), stored.view(np.uint8).astype(np.int32) - 127)
    return stored.astype(np.float32)


def dequantized(codes: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """A weight, value by value."""
    made = np.empty(codes.shape, np.float32)
    scales = scale_of(scale)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            by = scales[i // block[0], j // block[1]]
            made[i, j] = np.float32(value_of(int(codes[i, j]))) * by
    return made


def as_float(tensors: Mapping[str, np.ndarray], block: tuple[int, int]) -> Tensors:
    """The float tensors that those of an FP8 model stand for."""
    made = {}
    for name, array in tensors.items():
        if name.endswith(("_scale_inv", ".scale")):
            continue
        made[name] = array
        if array.dtype == ml_dtypes.float8_e4m3fn:
            path = name.removesuffix(".weight")
            scale = tensors.get(f"{name}_scale_inv", tensors.get(f"{path}.scale"))
            assert scale is not None
            made[name] = dequantized(array.view(np.uint8), scale, block)
    return made


def make_twins(
    model: Path,
    load: Callable[[Path], Tensors],
    save: Callable[[Path, Tensors], None],
    **options: Any,
) -> tuple[Path, Path]:
    """A model in FP8, and the same with float32 tensors in place of codes."""
    encoded, plain = model.with_name("fp8"), model.with_name("plain")
    chosen = {"block": (5, 7), **options}
    maker.make_fp8_source(model, encoded, maker.Options(**chosen))
    plain.mkdir()
    for path in model.iterdir():
        if not path.name.endswith((".safetensors", ".index.json")):
            shutil.copy(path, plain / path.name)
    save(plain / "model.safetensors", as_float(load(encoded), chosen["block"]))
    return encoded, plain


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def packed(codes: np.ndarray) -> np.ndarray:
    """Eight codes a word, the first in the lowest bits, each with 8 added."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for place in range(8):
        words |= (codes[:, place::8] + 8).astype(np.uint32) << (4 * place)
    return words.view(np.int32)


def pack_experts(tensors: Tensors, group: int = 32) -> tuple[Tensors, Tensors]:
    """A model's tensors with its experts in int4, and the float tensors that those stand for."""
    stored, exact = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if ".mlp.experts." not in name:
            continue
        path, (rows, columns) = name.removesuffix(".weight"), weight.shape
        groups = weight.astype(np.float32).reshape(rows, columns // group, group)
        scale = (np.abs(groups).max(axis=2) / 7).astype(ml_dtypes.bfloat16)
        codes = np.rint(groups / scale.astype(np.float32)[..., None]).clip(-8, 7).astype(np.int8)
        exact[name] = (codes * scale.astype(np.float32)[..., None]).reshape(rows, columns)
        del stored[name]
        stored[f"{path}.weight_packed"] = packed(codes.reshape(rows, columns))
        stored[f"{path}.weight_scale"] = scale
        stored[f"{path}.weight_shape"] = np.array([rows, columns])
    return stored, exact
