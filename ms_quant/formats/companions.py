"""``config.json`` and the copied files of a finished checkpoint, whatever its format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.files.atomic import sha256_file
from ms_quant.files.companion_files import companion_bytes, companion_files
from ms_quant.files.strict_json import read_json
from ms_quant.job.directory import find_difference
from ms_quant.job.unlisted import is_read
from ms_quant.models.config import ModelConfig, load_config, own_config, written_config
from ms_quant.models.spellings import DTYPE_KEYS, QUANTIZATION_KEYS, spelling_problems


def model_config(config: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    """config.json for old and new runtimes: no quantization entries, the dtype of what is float."""
    written = _without_quantization(written_config(config))
    inner = written.get("text_config")
    if isinstance(inner, Mapping):
        types = {key: dtype.name for key in DTYPE_KEYS if key in inner}
        written["text_config"] = {**_without_quantization(inner), **types}
    return {**written, **dict.fromkeys(DTYPE_KEYS, dtype.name)}


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}


def config_problems(
    directory: Path, dtype: np.dtype | None = None, entry: str = "", *, strict: bool = True
) -> Iterator[str]:
    """What the runtime would read wrongly in ``config.json``, one line each.

    Args:
        directory: the checkpoint.
        dtype: type of what stays float, where it is known.
        entry: the one that describes the checkpoint, if one does.
        strict: whether every runtime's spelling of a key must be there, as we write them; newer
            tools write that of their own alone.
    """
    path = directory / "config.json"
    raw = read_json(path)
    inner = raw.get("text_config")
    for part in (raw, inner if isinstance(inner, Mapping) else {}):
        for key in QUANTIZATION_KEYS:
            if key in part and not (part is raw and key == entry):
                yield f"{path}: has {key}, expected none"
    if strict:
        yield from spelling_problems(own_config(raw, str(path)), str(path))
    if dtype is None:
        return
    for key in DTYPE_KEYS:
        if raw.get(key) != dtype.name and (key in raw or (strict and key == "torch_dtype")):
            yield f"{path}: {key} is {raw.get(key)!r:.80}, expected {dtype.name!r}"


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
    expected = model_config(config or load_config(source), dtype)
    # Both spellings are compared; that one is missing is found elsewhere.
    ours = model_config(load_config(directory, entry), dtype)
    found = find_difference(ours, expected)
    if found:
        key, ours, theirs = found
        yield f"{path}: {key} is {ours!r:.80}, expected {theirs!r:.80} as the source has it"
    names = {*companion_files(source), *companion_files(directory)}
    for name in sorted(filter(is_read, names)):  # a licence may have come to either side since
        yield from copy_problems(directory / name, source / name)


def copy_problems(copy: Path, original: Path) -> Iterator[str]:
    """How a file is not the copy of another that it should be: there where that is, and equal."""
    if not original.is_file():
        if copy.exists():
            yield f"{copy}: expected no such file, the source has none"
    elif not copy.is_file():
        yield f"{copy}: no such file, expected a copy of the source's"
    elif sha256_file(copy) != sha256(companion_bytes(original)).hexdigest():
        yield f"{copy}: differs from the source's"
