"""Which safetensors files of a directory are a model's, by its index or by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ms_quant.errors import BadFileError
from ms_quant.files.strict_json import read_json
from ms_quant.files.writer import INDEX_NAME

SINGLE_NAME = "model.safetensors"
SHARDS = "model-*-of-*.safetensors"
MAX_INDEX_BYTES = 256 << 20


def find_index(directory: Path, prefix: str) -> Path | None:
    """The index of the files whose names begin so, where there is one.

    Raises:
        MsQuantError: there are several.
    """
    if INDEX_NAME.startswith(prefix) and (directory / INDEX_NAME).is_file():
        return directory / INDEX_NAME
    found = sorted(
        path
        for path in directory.glob(f"{prefix}*.index.json")
        if not path.name.endswith(".bin.index.json")
    )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise BadFileError(f"{directory}: has the indexes {names}, expected one")
    return found[0] if found else None


def refuse_second_model(index: Path, shards: set[str]) -> None:
    """Refuses a whole model beside an index of another: transformers would read the former."""
    single = index.with_name(SINGLE_NAME)
    if index.name == INDEX_NAME and single.is_file() and SINGLE_NAME not in shards:
        raise BadFileError(
            f"{single}: stands beside {index.name}, which does not name it, expected one of the "
            "two models: delete the file, or the index and its shards; runtimes differ in which "
            "they read"
        )


def unindexed_files(directory: Path, prefix: str) -> list[str]:
    """The files of a model without an index.

    Raises:
        MsQuantError: there is none, or there are those of two models.
    """
    if SINGLE_NAME.startswith(prefix) and (directory / SINGLE_NAME).is_file():
        shards = sorted(path.name for path in directory.glob(SHARDS))
        if shards:
            raise BadFileError(
                f"{directory}: has {SINGLE_NAME} and shards such as {shards[0]} with no index, "
                "expected one of the two: runtimes differ in which they read"
            )
        return [SINGLE_NAME]
    found = directory.glob(f"{prefix}*.safetensors")
    names = sorted(path.name for path in found if not path.name.startswith((".", "adapter_")))
    # Mistral's own files say the same again under other names.
    names = [name for name in names if not name.startswith("consolidated")] or names
    if not names:
        raise BadFileError(
            f"{directory}: found no {prefix and prefix + '*'}.safetensors file, expected at least "
            "one (.bin, .pt and other pickle files are not read)"
        )
    return names


def read_index(path: Path) -> dict[str, str]:
    """File names by tensor.

    Raises:
        MsQuantError: the index is malformed, or names a file that is not there.
    """
    shard_of = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise BadFileError(f"{path}: weight_map is {shard_of!r:.80}, expected file names by tensor")
    for name, shard in shard_of.items():
        _check_shard_name(shard, f"{path}: the shard of {name!r}")
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise BadFileError(
            f"{path.parent / missing[0]}: no such file, expected as {path} names it; "
            f"{len(missing)} of its {len(shards)} files are missing: get the rest of the model "
            "(hf download goes on where it stopped)"
        )
    return shard_of


def _check_shard_name(shard: Any, where: str) -> None:
    """The name stays in the directory. A symlink may lead out: Hugging Face caches are such."""
    if not isinstance(shard, str) or any(char in shard for char in "/\\:\0"):
        raise BadFileError(f"{where} is {shard!r:.80}, expected a file name without a path")
    if not shard.endswith(".safetensors"):
        raise BadFileError(
            f"{where} is {shard!r:.80}, expected a .safetensors file (pickle files are not read)"
        )
