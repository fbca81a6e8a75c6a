"""The description of the mindie-sd format: which layer of a network has which type.

The runtime's own rules, but that an entry which it would pass over in silence is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, UnsupportedError
from ms_quant.files.reader import Checkpoint
from ms_quant.files.safetensors_file import open_file
from ms_quant.files.strict_json import read_json
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
IGNORED = frozenset({"version", "group_size", "metadata", "optional"})
ATTENTION = (".fa_q.scale", ".fa_k.scale", ".fa_v.scale", ".quant_type")
ATTENTION_KEYS = frozenset({"fa_quant_type", "kv_quant_type", "kv_cache_type", "reduce_quant_type"})


@dataclass(frozen=True)
class Description:
    """Attributes:
    path: the file.
    model_type: what it calls the model.
    entries: key to type, in upper case, without those of the whole model.
    """

    path: Path
    model_type: str
    entries: dict[str, str]

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

    def check_all_used(self, names: Iterable[str]) -> None:
        """Refuses a quantized entry that is of none of the network's linears.

        Raises:
            MsQuantError: there is one.
        """
        known = set(names)
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


def read_description(path: Path) -> Description:
    """Reads a description.

    Args:
        path: the json file.

    Raises:
        MsQuantError: it is no description of this format, an entry is no type that linears can
            have, or one quantizes attention.
    """
    return read_content(read_json(path, MAX_DESCRIPTION_BYTES), path)


def read_content(content: Mapping[str, Any], path: Path) -> Description:
    """The same of the content of a file.

    Raises:
        MsQuantError: as :func:`read_description`.
    """
    if GLOBAL_TYPE not in content:
        raise BadFileError(
            f"{path}: has no {GLOBAL_TYPE!r}, expected a type that names the weights"
        )
    model_type = check_model_type(content[GLOBAL_TYPE], f"{path}: {GLOBAL_TYPE}")
    return Description(path, model_type, dict(_entries(content, path)))


def _entries(content: Mapping[str, object], path: Path) -> Iterable[tuple[str, str]]:
    for key, value in content.items():
        if key == GLOBAL_TYPE or key in IGNORED:
            continue
        quantized = not (isinstance(value, str) and value.upper() == FLOAT)
        if quantized and (key.endswith(ATTENTION) or key in ATTENTION_KEYS):
            raise UnsupportedError(
                f"{path}: {key} is {value!r:.80}, quantized attention is not read here, expected "
                "types of linears only"
            )
        yield key, check_type(value, f"{path}: {key}")


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
