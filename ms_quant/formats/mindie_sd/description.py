"""The description of the mindie-sd format: which layer of a network has which type.

The runtime's own rules, but that an entry which it would pass over in silence is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, UnsupportedError
from ms_quant.files.reader import Checkpoint
from ms_quant.files.safetensors_file import open_file
from ms_quant.files.strict_json import read_json
from ms_quant.formats.mindie_sd.attention_types import check_attention_type, is_attention_type
from ms_quant.formats.mindie_sd.held import RUN_DTYPES
from ms_quant.formats.mindie_sd.types import (
    FLOAT,
    GLOBAL_TYPE,
    check_model_type,
    check_type,
    weights_name,
)
from ms_quant.numerics.storage import DTYPES

MAX_DESCRIPTION_BYTES = 256 << 20
DTYPE = "dtype"  # in __metadata__ of the weights, which the runtime does not look at
PATTERNS = ("{}.linear.weight", "{}.weight", "{}", "{}.fa_q.scale", "{}.quant_type")
METADATA, FLOAT_STEPS = "metadata", "attention_float_steps"
IGNORED = frozenset({"version", "group_size", METADATA, "optional"})
ATTENTION = (
    *(f".fa_{name}.{what}" for name in "qkv" for what in ("scale", "offset")),
    ".quant_type",
)
FA_TYPE = "fa_quant_type"
CACHE_KEYS = frozenset({"kv_quant_type", "kv_cache_type", "reduce_quant_type"})


@dataclass(frozen=True)
class Description:
    """Attributes:
    path: the file.
    model_type: what it calls the model.
    entries: key to type, in upper case, without those of the whole model and of attention.
    attention: path of each quantized attention to its type, in upper case.
    float_steps: path of an attention to the steps in which it is float, as ms-quant writes them
        where the runtime does not look.
    """

    path: Path
    model_type: str
    entries: dict[str, str]
    attention: dict[str, str] = field(default_factory=dict)
    float_steps: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def type_of(self, name: str) -> str:
        """The type of a linear: ``FLOAT`` where any of its keys says so, else the first key's.

        Raises:
            MsQuantError: it has no key; the runtime would leave it float without a word.
        """
        found = [self.entries[key] for key in _keys(name) if key in self.entries]
        if not found:
            raise BadFileError(
                f"{self.path}: names no {name + '.weight'!r}, expected a type or FLOAT for every "
                "linear of the network"
            )
        return FLOAT if FLOAT in found else found[0]

    def attention_of(self, name: str) -> str | None:
        """The type of an attention; None where it stays float, which needs no key."""
        if any(self.entries.get(key) == FLOAT for key in _keys(name)):
            return None
        return self.attention.get(name)

    def check_all_used(self, names: Iterable[str], attentions: Iterable[str] = ()) -> None:
        """Refuses a quantized entry that is of none of the network's linears and attentions.

        Raises:
            MsQuantError: there is one.
        """
        known, layers = set(names), set(attentions)
        for path, value in self.attention.items():
            if path not in layers:
                shown = ", ".join(sorted(layers)[:3]) or "linears alone"
                raise BadFileError(
                    f"{self.path}: {path} is attention in {value} but the network has no such "
                    f"attention, expected paths of its own, such as {shown}"
                )
        for key, value in self.entries.items():
            if value != FLOAT and not any(start in known for start in _starts(key)):
                shown = ", ".join(sorted(known)[:3])
                raise BadFileError(
                    f"{self.path}: {key} is {value} but the network has no such linear, expected "
                    f"keys of its own, such as {shown}"
                )


def _keys(name: str) -> list[str]:
    return [pattern.format(name) for pattern in PATTERNS]


def _starts(key: str) -> Iterable[str]:
    """A key and everything before one of its dots."""
    yield key
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def read_description(path: Path, attention: bool = False) -> Description:
    """Reads a description.

    Args:
        path: the json file.
        attention: whether attention may be quantized: in networks, not in decoders.

    Raises:
        MsQuantError: it is no description of this format, an entry is no type that linears, or
            attention, can have, or one quantizes attention where it may not be.
    """
    return read_content(read_json(path, MAX_DESCRIPTION_BYTES), path, attention)


def read_content(content: Mapping[str, Any], path: Path, attention: bool = False) -> Description:
    """The same of the content of a file.

    Raises:
        MsQuantError: as :func:`read_description`.
    """
    if GLOBAL_TYPE not in content:
        raise BadFileError(
            f"{path}: has no {GLOBAL_TYPE!r}, expected a type that names the weights"
        )
    model_type = check_model_type(content[GLOBAL_TYPE], f"{path}: {GLOBAL_TYPE}", attention)
    description = Description(path, model_type, {})
    for key, value in content.items():
        if key != GLOBAL_TYPE and key not in IGNORED:
            _add(description, key, value, attention)
    _add_float_steps(description, content.get(METADATA))
    return description


def _add_float_steps(description: Description, metadata: object) -> None:
    """Adds the float steps of ms-quant's own files.

    Raises:
        MsQuantError: they are malformed, or of no quantized attention.
    """
    found = metadata.get(FLOAT_STEPS, {}) if isinstance(metadata, dict) else {}
    where = f"{description.path}: {FLOAT_STEPS} of {METADATA}"
    if not isinstance(found, dict):
        raise BadFileError(f"{where} is {found!r:.80}, expected attentions and lists of steps")
    for path, steps in found.items():
        right = isinstance(steps, list) and all(type(n) is int and n >= 0 for n in steps)
        if not right or path not in description.attention:
            raise BadFileError(
                f"{where}: {path!r:.80} is {steps!r:.80}, expected steps from 0 of an attention "
                "that is quantized"
            )
        description.float_steps[path] = tuple(steps)


def _add(description: Description, key: str, value: object, attention: bool) -> None:
    """Adds an entry.

    Raises:
        MsQuantError: it is no type of what the key names, or may not be there.
    """
    where = f"{description.path}: {key}"
    is_float = isinstance(value, str) and value.upper() == FLOAT
    layer = None if is_float else _attention_of(key, value)
    cache = key in CACHE_KEYS and not is_float
    if cache or (not attention and (layer is not None or (key == FA_TYPE and not is_float))):
        what = "a quantized cache" if cache else "quantized attention"
        raise UnsupportedError(
            f"{where} is {value!r:.80}, {what} is not read here, expected types of linears"
            f"{' and attention' if attention else ' only'}"
        )
    if layer is None and key != FA_TYPE:
        description.entries[key] = check_type(value, where)
    elif not is_float:
        kind = check_attention_type(value, where)
        if layer is not None and description.attention.setdefault(layer, kind) != kind:
            raise BadFileError(
                f"{where} is {value!r}, expected {description.attention[layer]} as another entry "
                "of that attention says"
            )


def _attention_of(key: str, value: object) -> str | None:
    """The path of the attention that an entry is of, None for an entry of something else."""
    for ending in ATTENTION:
        if key.endswith(ending):
            return key.removesuffix(ending)
    tensor = key.rpartition(".")[2] in ("weight", "bias")
    return key if is_attention_type(value) and not tensor and key != FA_TYPE else None


def open_weights(description: Description, rank: int | None) -> OneFile:
    """The weights beside a description.

    Args:
        description: that was read.
        rank: at the end of both files' names, None for none.

    Raises:
        MsQuantError: there is no such file, or it is malformed.
    """
    directory = description.path.parent
    name = weights_name(description.model_type, rank)
    if not (directory / name).is_file():
        raise BadFileError(
            f"{directory / name}: no such file, expected the weights of {description.path.name} "
            f"there as its {GLOBAL_TYPE} is {description.model_type}"
        )
    return OneFile(directory / name)


class OneFile(Checkpoint):
    """A checkpoint that is one file; its neighbours and indexes are not looked at."""

    def __init__(self, path: Path) -> None:
        self.directory, self._index, file = path.parent, None, open_file(path)
        self._open, self._places = {path.name: file}, dict.fromkeys(file.tensors, path.name)


def made_for(weights: OneFile) -> np.dtype | None:
    """The type that a file of ours says its network runs in; None where it says nothing.

    Raises:
        MsQuantError: there is no such type.
    """
    (path,) = weights.files()
    name = weights.shard(path.name).metadata.get(DTYPE)
    if name is not None and name not in RUN_DTYPES:
        raise BadFileError(
            f"{path}: {DTYPE} of __metadata__ is {name!r:.80}, expected {' or '.join(RUN_DTYPES)}"
        )
    return None if name is None else DTYPES[name]


def rank_of(path: Path) -> int | None:
    """The number at the end of a description's name, None where there is none."""
    last = path.stem.rpartition("_")[2]
    return int(last) if last.isascii() and last.isdigit() else None


def with_rank(path: Path, rank: int) -> Path:
    """The description of another rank."""
    return path.with_name(f"{path.stem.rpartition('_')[0]}_{rank}{path.suffix}")
