"""``config.json`` and the copied files of a finished checkpoint, whatever its flavour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.checkpoint.atomic import sha256_file
from ms_quant.checkpoint.finish import COPIED
from ms_quant.checkpoint.job import find_difference
from ms_quant.checkpoint.unlisted import is_read
from ms_quant.models.config import ModelConfig, load_config
from ms_quant.strict_json import read_json

QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def model_config(raw: Mapping[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """config.json for the runtime: no quantization entries, and the dtype of what stays float.

    Older runtimes read only ``torch_dtype``, so it is always there; ``dtype`` where the source
    has it.
    """
    config = {key: value for key, value in raw.items() if key not in QUANTIZATION_KEYS}
    if isinstance(config.get("text_config"), Mapping):
        inner = config["text_config"].items()
        config["text_config"] = {k: v for k, v in inner if k not in QUANTIZATION_KEYS}
    if "dtype" in config:
        config["dtype"] = dtype.name
    config["torch_dtype"] = dtype.name
    return config


def config_problems(
    directory: Path, dtype: np.dtype | None = None, entry: str = ""
) -> Iterator[str]:
    """What the runtime would read wrongly in ``config.json``, one line each.

    Args:
        directory: the checkpoint.
        dtype: type of what stays float, where it is known.
        entry: the one that describes the checkpoint, if one does.
    """
    path = directory / "config.json"
    raw = read_json(path)
    inner = raw.get("text_config")
    for part in (raw, inner if isinstance(inner, Mapping) else {}):
        for key in QUANTIZATION_KEYS:
            if key in part and not (part is raw and key == entry):
                yield f"{path}: has {key}, expected none"
    if dtype is None:
        return
    for key, found in (("torch_dtype", raw.get("torch_dtype")), ("dtype", raw.get("dtype"))):
        if found != dtype.name and (key in raw or key == "torch_dtype"):
            yield f"{path}: {key} is {found!r:.80}, expected {dtype.name!r}"


def source_problems(
    directory: Path,
    source: Path,
    dtype: np.dtype,
    config: ModelConfig | None = None,
    entry: str = "",
) -> Iterator[str]:
    """Where ``config.json`` and the tokenizer files are not the source's, one line each.

    Args:
        directory: the checkpoint.
        source: the float checkpoint that it was made from.
        dtype: type of what stays float.
        config: of the model that was quantized, where it is not the source's own.
        entry: the one of config.json that describes the checkpoint, if one does.
    """
    path = directory / "config.json"
    expected = model_config((config or load_config(source)).raw, dtype)
    ours = {key: value for key, value in read_json(path).items() if key != entry}
    found = find_difference(ours, expected)
    if found:
        key, ours, theirs = found
        yield f"{path}: {key} is {ours!r:.80}, expected {theirs!r:.80} as the source has it"
    for name in filter(is_read, COPIED):  # a licence may have come to either side since
        yield from copy_problems(directory / name, source / name)


def copy_problems(copy: Path, original: Path) -> Iterator[str]:
    """How a file is not the copy of another that it should be: there where that is, and equal."""
    if not original.is_file():
        if copy.exists():
            yield f"{copy}: expected no such file, the source has none"
    elif not copy.is_file():
        yield f"{copy}: no such file, expected a copy of the source's"
    elif sha256_file(copy) != sha256_file(original):
        yield f"{copy}: differs from the source's"
