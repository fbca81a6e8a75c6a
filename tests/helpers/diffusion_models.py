"""Tiny diffusion transformers as diffusers names them, and a reader of what vllm-omni reads.

Written and read here without the code under test; the reader follows docs/vllm_omni_format.md.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden" / "diffusers.json"
MODELS: dict[str, Any] = json.loads(GOLDEN.read_text())["models"]
FLOATS = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPES = {
    **FLOATS,
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
WIDTHS = ("attention_head_dim", "ffn_dim", "text_dim", "freq_dim")


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    header, data = {}, b""
    for name, array in tensors.items():
        start, data = len(data), data + array.tobytes()
        header[name] = {
            "dtype": CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, len(data)],
        }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def load_tensors(directory: Path) -> dict[str, np.ndarray]:
    """The tensors of all files of a transformer."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            array = np.frombuffer(content[start:stop], DTYPES[entry["dtype"]])
            found[name] = array.reshape(entry["shape"])
    return found


def tensors_of(
    key: str, *, scale: int = 1, code: str = "F32", seed: int = 0, blocks: int = 2
) -> dict[str, np.ndarray]:
    """Random numbers under the names of a golden model; widths of 32 and more are multiplied."""
    rng, made = np.random.default_rng(seed), {}
    for name, shape in MODELS[key]["tensors"].items():
        if blocks == 1 and name.startswith("blocks.1."):
            continue
        sizes = [n * scale if n >= 32 else n for n in shape]
        made[name] = (rng.standard_normal(sizes, np.float32) * np.float32(0.1)).astype(FLOATS[code])
    return made


def save_transformer(
    directory: Path,
    key: str,
    tensors: Mapping[str, np.ndarray] | None = None,
    scale: int = 1,
    blocks: int = 2,
) -> Path:
    directory.mkdir(parents=True)
    config = {**MODELS[key]["config"], "num_layers": blocks}
    config |= {name: config[name] * scale for name in WIDTHS if name in config}
    (directory / "config.json").write_text(json.dumps(config))
    made = tensors_of(key, scale=scale, blocks=blocks) if tensors is None else tensors
    save_tensors(directory / "diffusion_pytorch_model.safetensors", made)
    return directory


def save_pipeline(directory: Path, **transformers: str) -> Path:
    """A pipeline of transformers by their names, with a VAE, a scheduler and a tokenizer."""
    index: dict[str, Any] = {
        "_class_name": "WanPipeline",
        "boundary_ratio": 0.875,
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    for seed, (name, key) in enumerate(transformers.items()):
        save_transformer(directory / name, key, tensors_of(key, seed=seed))
        index[name] = ["diffusers", MODELS[key]["config"]["_class_name"]]
    for name, files in {
        "scheduler": {"scheduler_config.json": b"\xef\xbb\xbf{}"},  # copied with its mark
        "tokenizer": {"tokenizer.json": b"{}", "spiece.model": b"\x00\x01"},
        "vae": {"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"\x02" * 3000},
    }.items():
        (directory / name).mkdir()
        for file, content in files.items():
            (directory / name / file).write_bytes(content)
    (directory / "model_index.json").write_text(json.dumps(index))
    (directory / "LICENSE.md").write_text("do as you like")
    (directory / "whole_model.safetensors").write_bytes(b"\x00" * 100)  # of other programs
    return directory


def dequantized(root: Path, name: str = "transformer") -> dict[str, np.ndarray]:
    """The float32 weights that vllm-omni's rules make of a transformer, and its other tensors."""
    directory, tensors = root / name, load_tensors(root / name)
    entry = json.loads((directory / "config.json").read_text())["quantization_config"]
    method, result = entry["quant_method"], {}
    for full, array in tensors.items():
        path, _, suffix = full.rpartition(".")
        scale = tensors.get(f"{path}.weight_scale")
        if suffix.endswith(("_scale", "_offset")):
            continue
        if suffix != "weight" or scale is None:
            result[full] = array.astype(np.float32)
            continue
        if method == "ascend":
            kinds = json.loads((root / "quant_model_description.json").read_text())
            result[full] = _ascend(kinds[full], array, scale, tensors.get(f"{path}.weight_offset"))
            continue
        assert array.dtype == DTYPES["F8_E4M3"] and scale.dtype == DTYPES["U8"]
        weight = array.astype(np.float32) * _powers(scale)
        if method == "mxfp4_dualscale":
            long = tensors[f"{path}.weight_dual_scale"][..., 0].repeat(512, axis=1)
            weight *= long[:, : weight.shape[1]] * tensors[f"{path}.mul_scale"]
        result[full] = weight
    return result


def _powers(scale: np.ndarray) -> np.ndarray:
    return np.exp2(scale.astype(np.float32) - 127).repeat(32, axis=1)


def _ascend(
    kind: str, codes: np.ndarray, scale: np.ndarray, offset: np.ndarray | None
) -> np.ndarray:
    if kind == "W4A8_MXFP":
        pairs = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], axis=-1)
        return pairs.reshape(len(codes), -1) * _powers(scale)
    return (codes.astype(np.float32) + (0 if offset is None else offset)) * scale
