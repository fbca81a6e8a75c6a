"""The layout of vllm-mindspore.

    config.json, tokenizer files, quant_model_description_w8a8sc.json, ms_quant.json
    rank_K/model-0000I-of-0000N.safetensors   one file for each block, the last for the rest
    proof/block-0000I.proof                   what recomputing the int8 weights needs

docs/w8a8sc.md says what is known of it and what is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ms_quant.errors import BadFileError
from ms_quant.files.strict_json import read_json
from ms_quant.models.config import ModelConfig
from sparse_compress.layouts.base import (
    MAX_DESCRIPTION_BYTES,
    MAX_RANKS,
    Layout,
    Length,
    Target,
    rank_name,
)

DESCRIPTION = "quant_model_description_w8a8sc.json"
DEVICE = "310P"
KIND = "W8A8S"


def describe(layout: Layout, length: Length) -> dict[str, Any]:
    """The description of a checkpoint.

    Args:
        layout: the checkpoint.
        length: gives the length of a coded tensor from its rank and name.

    Returns:
        JSON; a linear that its rank's entry does not list is read as float16.
    """
    result: dict[str, Any] = {"device_type": DEVICE}
    for rank in range(layout.tp):
        entries: dict[str, Any] = {}
        for _, _, fused in layout.linears():
            if fused in layout.compressed:
                entries[f"{fused}.weight"] = KIND
                for suffix in ("weight", "index"):
                    name = f"{fused}.{suffix}"
                    entries[f"{name}.shape"] = [length(rank, name)]
        result[rank_name(rank)] = entries
    return result


def read_layout(directory: Path, config: ModelConfig) -> Layout:
    """The layout that a directory's description states.

    Args:
        directory: the checkpoint.
        config: its model.

    Raises:
        MsQuantError: the description is malformed, or its ranks differ.
    """
    path = directory / DESCRIPTION
    value = read_json(path, MAX_DESCRIPTION_BYTES)
    if value.get("device_type") != DEVICE:
        raise BadFileError(
            f"{path}: device_type is {value.get('device_type')!r}, expected {DEVICE!r}"
        )
    ranks = {key: entry for key, entry in value.items() if key != "device_type"}
    if not ranks or len(ranks) > MAX_RANKS or set(ranks) != set(map(rank_name, range(len(ranks)))):
        raise BadFileError(f"{path}: describes {sorted(ranks)!r:.80}, expected rank_0, rank_1, ...")
    compressed = [_compressed(entry, f"{path}: {key}") for key, entry in sorted(ranks.items())]
    for key, found in zip(sorted(ranks), compressed, strict=True):
        if found != compressed[0]:
            name = min(found ^ compressed[0])
            raise BadFileError(f"{path}: {key} and rank_0 differ in {name}, expected the same kind")
    unknown = compressed[0] - {fused for _, _, fused in TARGET.linears(config)}
    if unknown:
        raise BadFileError(f"{path}: names {min(unknown)}, expected a linear of the model")
    return Layout(config, len(ranks), compressed[0], TARGET)


def _compressed(entry: Any, where: str) -> frozenset[str]:
    """Fused paths that a rank's entry lists, each with both shapes."""
    if not isinstance(entry, dict):
        raise BadFileError(f"{where} is {entry!r:.80}, expected an object")
    found = []
    for key, value in entry.items():
        if key.endswith(".shape"):
            good = isinstance(value, list) and len(value) == 1 and type(value[0]) is int
            if not good:
                raise BadFileError(f"{where}: {key} is {value!r:.80}, expected one number")
        elif value == KIND and key.endswith(".weight"):
            found.append(key.removesuffix(".weight"))
        else:
            raise BadFileError(f"{where}: {key} is {value!r:.80}, expected {KIND!r}")
    expected = {f"{path}.{suffix}" for path in found for suffix in ("weight.shape", "index.shape")}
    wrong = expected ^ {key for key in entry if key.endswith(".shape")}
    if wrong:
        name = min(wrong)
        hint = "is missing, the runtime reads the linear as FLOAT without it"
        raise BadFileError(f"{where}: {name} {hint if name in expected else 'has no linear'}")
    return frozenset(found)


def is_described(directory: Path) -> bool:
    """Whether a directory has such a description; msModelSlim uses the same file name."""
    path = directory / DESCRIPTION
    return path.exists() and "model_quant_type" not in read_json(path, MAX_DESCRIPTION_BYTES)


TARGET = Target(
    name="vllm-mindspore",
    runtime="vllm-mindspore on Atlas 300I Duo "
    "(--quantization golden-stick --load-format sparse_quant)",
    claim="vllm-mindspore serves W8A8SC",
    families=("qwen2", "qwen3"),
    description=DESCRIPTION,
    ranks="rank_*",
    rank_path=rank_name,
    one_file=False,
    per_channel_input=True,
    info=False,
    refusal=lambda config, tp: None,
    describe=describe,
    found=is_described,
    read=read_layout,
)
