"""What a directory of diffusers is: a pipeline with its components, or one transformer alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ms_quant.diffusers.families import FAMILIES
from ms_quant.errors import BadFileError, MsQuantError, UnsupportedError, short
from ms_quant.files.companion_files import is_companion
from ms_quant.files.hub_cache import find_snapshot
from ms_quant.files.strict_json import read_json
from ms_quant.formats.source_kind import wrong_content
from ms_quant.job.output_directory import RECORD

INDEX, CONFIG, CLASS = "model_index.json", "config.json", "_class_name"
TRANSFORMER = "transformer"
MAX_LEVELS, MAX_COPIED = 3, 2048
READ = (".safetensors", ".json", ".model", ".txt")
"""Endings of files that are looked into: a Git LFS pointer is no weight."""


@dataclass(frozen=True)
class DiffusersDirectory:
    """A directory of diffusers.

    Attributes:
        path: the directory.
        transformers: the directories in it that hold transformers; ``""`` is itself.
        copied: paths in it, with ``/``, of all that is no transformer.
    """

    path: Path
    transformers: tuple[str, ...]
    copied: tuple[str, ...]

    def copied_bytes(self) -> dict[str, int]:
        """The sizes of the files that are copied."""
        return {name: (self.path / name).stat().st_size for name in self.copied}


def is_diffusers(path: Path) -> bool:
    """Whether a path is a directory of diffusers, or the cache of one."""
    try:
        path = find_snapshot(path) or path if path.is_dir() else path
    except MsQuantError:
        return False
    if path.absolute().name.endswith(".partial") and (path / RECORD).is_file():
        return False  # what a command that was stopped has made
    if (path / INDEX).is_file():
        return True
    try:
        return (path / CONFIG).is_file() and CLASS in read_json(path / CONFIG)
    except MsQuantError:
        return False


def open_directory(path: Path) -> DiffusersDirectory:
    """The directory of diffusers that a path stands for.

    Raises:
        MsQuantError: it has no transformer that is known, or a component is missing.
    """
    path = find_snapshot(path) or path
    if not (path / INDEX).is_file():
        class_of(path)
        return DiffusersDirectory(path, ("",), tuple(_licences(path)))
    components = _components(read_json(path / INDEX))
    transformers = [name for name, kind in components.items() if _is_transformer(name, kind)]
    for name in components:
        if not (path / name).is_dir():
            raise BadFileError(
                f"{path / name}: no such directory, expected the {components[name]} that {INDEX} "
                "names (an unfinished download?)"
            )
    if not transformers:
        kinds = ", ".join(components.values()) or "no components"
        raise UnsupportedError(
            f"{path / INDEX}: names {kinds}, expected a {TRANSFORMER} of one of the classes "
            f"{', '.join(FAMILIES)}"
        )
    for name in transformers:
        class_of(path / name)
    copied = [INDEX, *_licences(path)]
    for name in components.keys() - set(transformers):
        copied += _files(path, path / name)
    if len(copied) > MAX_COPIED:
        raise BadFileError(
            f"{path}: has {len(copied)} files beside its transformers, expected at most "
            f"{MAX_COPIED}"
        )
    for name in copied:
        _refuse_broken(path / name)
    return DiffusersDirectory(path, tuple(sorted(transformers)), tuple(sorted(copied)))


def class_of(directory: Path) -> str:
    """The class of a transformer.

    Raises:
        MsQuantError: it is none that is known.
    """
    config = directory / CONFIG
    found = read_json(config).get(CLASS)
    if found not in FAMILIES:
        raise UnsupportedError(
            f"{config}: {CLASS} is {short(found)}, expected one of {', '.join(FAMILIES)}"
        )
    return str(found)


def _components(index: dict[str, Any]) -> dict[str, str]:
    """Name to class of the components that a pipeline has."""
    pairs = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2}
    for name in pairs:
        if not name.replace("_", "").isalnum():
            raise BadFileError(f"{INDEX}: names a component {short(name)}, expected a word")
    return {name: str(kind) for name, (library, kind) in pairs.items() if library and kind}


def _is_transformer(name: str, kind: str) -> bool:
    return kind in FAMILIES or name.startswith(TRANSFORMER)


def _licences(path: Path) -> Iterator[str]:
    """Texts beside the components; a pipeline's root has pictures and whole models, too."""
    for item in sorted(path.iterdir()):
        named = is_companion(item.name) and item.suffix.lower() in ("", ".md", ".txt")
        if named and item.is_file():
            yield item.name


def _files(root: Path, directory: Path, level: int = 0) -> Iterator[str]:
    """The files of a component. A file may be a link, as in a hub's cache; a directory not."""
    for item in sorted(directory.iterdir()):
        if item.name.startswith("."):
            continue
        if item.is_dir():
            if item.is_symlink() or level == MAX_LEVELS:
                raise BadFileError(f"{item}: is a directory, expected only files here")
            yield from _files(root, item, level + 1)
        else:
            yield item.relative_to(root).as_posix()


def _refuse_broken(path: Path) -> None:
    if path.exists() and path.suffix.lower() not in READ:
        return
    wrong = wrong_content(path)
    if wrong:
        raise BadFileError(f"{path}: is {wrong}")
