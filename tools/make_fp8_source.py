"""Makes an FP8 copy of a float checkpoint, stored as DeepSeek and Qwen publish theirs.

``make_fp8_source.py MODEL OUTPUT`` stores the weights of linears as e4m3 codes with one scale for
each block, ``weight_scale_inv``, and says so in config.json. Embeddings, heads, norms, routers and
what ``--keep`` names stay as they are. It knows nothing of the reader in ms_quant, which is tested
with what it makes. One tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

KEPT = (
    r"(^|\.)(embed_tokens|lm_head|score|eh_proj|shared_head\.head|mlp\.gate|shared_expert_gate)"
    r"\.weight$"
)
"""Matrices that published checkpoints do not have in FP8."""
INDEX = "model.safetensors.index.json"
SCALES = "model-scales.safetensors"
LARGEST = 448.0
TYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U8": np.dtype(np.uint8),
}
SIZES = {"F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "BOOL": 1, "F8_E5M2": 1}
SIZES |= {code: dtype.itemsize for code, dtype in TYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor to write: its type, its shape and its bytes."""

    code: str
    shape: tuple[int, ...]
    read: Callable[[], bytes]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * SIZES[self.code]


@dataclass(frozen=True)
class Options:
    """Attributes:
    block: rows and columns of a block.
    scale: type of scales.
    powers: whether scales are powers of two.
    apart: whether scales are in a file of their own.
    suffix: what stands in place of ``weight`` in a scale's name.
    keep: pattern of names that stay float.
    """

    block: tuple[int, int] = (128, 128)
    scale: str = "F32"
    powers: bool = False
    apart: bool = False
    suffix: str = "weight_scale_inv"
    keep: str = KEPT


def to_blocks(
    weight: np.ndarray, block: tuple[int, int], scale: str = "F32", powers: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The e4m3 codes of a matrix, uint8, and the scales of its blocks as they are stored."""
    (rows, columns), (high, wide) = weight.shape, block
    down, across = -(-rows // high), -(-columns // wide)
    padded = np.zeros((down * high, across * wide), np.float32)
    padded[:rows, :columns] = weight
    blocks = padded.reshape(down, high, across, wide)
    scales = np.abs(blocks).max(axis=(1, 3)) / np.float32(LARGEST)
    scales[scales == 0] = 1
    if powers or scale in ("F8_E8M0", "U8"):
        scales = np.exp2(np.ceil(np.log2(scales.astype(np.float64)))).astype(np.float32)
    stored = scales.astype(TYPES["F8_E8M0"]).view(np.uint8) if scale == "U8" else scales
    stored = stored.astype(TYPES[scale])
    exact = scales if scale == "U8" else stored.astype(np.float32)
    steps = np.clip(blocks / exact[:, None, :, None], -LARGEST, LARGEST)
    codes = steps.astype(TYPES["F8_E4M3"]).view(np.uint8).reshape(padded.shape)
    return np.ascontiguousarray(codes[:rows, :columns]), stored


def make_fp8_source(source: Path, output: Path, options: Options) -> None:
    """Writes the copy."""
    output.mkdir(parents=True)
    names: dict[str, str] = {}
    apart: dict[str, Stored] = {}
    kept = []
    for path in sorted(source.glob("*.safetensors")):
        tensors: dict[str, Stored] = {}
        for name, stored in read_tensors(path):
            if len(stored.shape) != 2 or re.search(options.keep, name):
                tensors[name] = stored
                kept += [name.removesuffix(".weight")] if name.endswith(".weight") else []
                continue
            codes, scale = _encoded(stored, options)
            tensors[name] = codes
            beside = apart if options.apart else tensors
            beside[f"{name.removesuffix('weight')}{options.suffix}"] = scale
        write_tensors(output / path.name, tensors)
        names |= dict.fromkeys(tensors, path.name)
    if options.apart:
        write_tensors(output / SCALES, apart)
        names |= dict.fromkeys(apart, SCALES)
    if len(set(names.values())) > 1:
        content = {"metadata": {}, "weight_map": dict(sorted(names.items()))}
        (output / INDEX).write_text(json.dumps(content, indent=1))
    _write_config(source, output, options, kept)
    for path in source.iterdir():
        if path.is_file() and not (output / path.name).exists() and path.name != "ms_quant.json":
            shutil.copy(path, output / path.name)


def _encoded(stored: Stored, options: Options) -> tuple[Stored, Stored]:
    """Codes and scales, each made when it is written."""

    def make() -> tuple[np.ndarray, np.ndarray]:
        weight = np.frombuffer(stored.read(), TYPES[stored.code]).reshape(stored.shape)
        return to_blocks(weight.astype(np.float32), options.block, options.scale, options.powers)

    rows, columns = (-(-n // step) for n, step in zip(stored.shape, options.block, strict=True))
    return (
        Stored("F8_E4M3", stored.shape, lambda: make()[0].tobytes()),
        Stored(options.scale, (rows, columns), lambda: make()[1].tobytes()),
    )


def read_tensors(path: Path) -> Iterator[tuple[str, Stored]]:
    """The tensors of a safetensors file, in the order of their bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        read = _reader(path, 8 + length + first, last - first)
        yield name, Stored(entry["dtype"], tuple(entry["shape"]), read)


def _reader(path: Path, start: int, size: int) -> Callable[[], bytes]:
    def read() -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)

    return read


def write_tensors(path: Path, tensors: dict[str, Stored]) -> None:
    """Writes a safetensors file, wide types first."""
    ordered = sorted(tensors.items(), key=lambda item: (-SIZES[item[1].code], item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, stored in ordered:
        ends = [offset, offset + stored.size]
        header[name] = {"dtype": stored.code, "shape": list(stored.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, stored in ordered:
            file.write(stored.read())


def _write_config(source: Path, output: Path, options: Options, kept: list[str]) -> None:
    config = json.loads((source / "config.json").read_text())
    entry: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": sorted(kept),
        "quant_method": "fp8",
        "weight_block_size": list(options.block),
    }
    if options.powers or options.scale in ("F8_E8M0", "U8"):
        entry["scale_fmt"] = "ue8m0"
    config["quantization_config"] = entry
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--block", type=int, nargs=2, default=(128, 128), metavar=("ROWS", "COLS"))
    parser.add_argument("--scale-dtype", default="F32", choices=["F32", "BF16", "F8_E8M0", "U8"])
    parser.add_argument("--ue8m0", action="store_true", help="scales are powers of two")
    parser.add_argument("--scales-apart", action="store_true", help="in a file of their own")
    parser.add_argument("--suffix", default="weight_scale_inv", help="weight_scale_inv or scale")
    parser.add_argument("--keep", default=KEPT, help="pattern of names that stay float")
    given = parser.parse_args()
    options = Options(
        tuple(given.block),
        given.scale_dtype,
        given.ue8m0,
        given.scales_apart,
        given.suffix,
        given.keep,
    )
    make_fp8_source(given.source, given.output, options)


if __name__ == "__main__":
    main()
