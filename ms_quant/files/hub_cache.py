"""The caches that hubs download into: the snapshot of a repository, and what is no place to write.

A cache of ``huggingface_hub`` holds ``models--ORG--NAME`` with ``blobs``, ``refs`` and
``snapshots/COMMIT``, whose files are links into ``blobs``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ms_quant.errors import BadFileError, MsQuantError

MAX_LISTED = 8
_REPOSITORY = re.compile(r"models--(?:(?P<org>[\w.-]+?)--)?(?P<name>[\w.-]+)")
_HUB_ID = re.compile(
    r"(?:hf:/+|(?:https?:/+)?(?:huggingface\.co|hf\.co|hf-mirror\.com|"
    r"(?:www\.)?modelscope\.(?:cn|ai)/models)/+)?"
    r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(?:tree|blob|resolve|files|summary)(?:/.*)?)?/*"
)


def hub_id(path: Path) -> str:
    """What a path stands for if it is a model's name on a hub, or its address; else nothing."""
    match = _HUB_ID.fullmatch(path.as_posix())
    return match["id"] if match else ""


def repository(path: Path) -> Path | None:
    """The directory of a cached repository that a path is or lies in."""
    path = path.absolute()
    for place in (path, *path.parents):
        if _REPOSITORY.fullmatch(place.name):
            return place
    return None


def repository_id(place: Path) -> str:
    """The name on the hub of a cached repository."""
    match = _REPOSITORY.fullmatch(place.name)
    return "" if match is None else "/".join(filter(None, (match["org"], match["name"])))


def download_command(name: str) -> str:
    """What downloads a model, or the rest of one."""
    return f"hf download {name}"


def find_snapshot(path: Path) -> Path | None:
    """The snapshot that a directory of a hub's cache stands for; None for any other directory.

    It is the one that ``refs/main`` names, or the only one.

    Raises:
        MsQuantError: there are several, or none, or the directory is that of the blobs or refs.
    """
    place = path.absolute()
    path = path if path.name not in ("", "..") else place
    root = place if _is_repository(place) else place.parent
    if not _is_repository(root):
        return None
    found = sorted(item for item in _directories(root / "snapshots") if not item.is_symlink())
    if not found:
        raise BadFileError(
            f"{path}: is a cached repository without a snapshot, expected the files of a model; "
            f"{download_command(repository_id(root))} downloads them"
        )
    chosen = _main(root, found) or (found[0] if len(found) == 1 else None)
    shown = path if place == root else path.parent
    if place not in (root, root / "snapshots"):
        wanted = shown / "snapshots" / (chosen or found[0]).name
        raise BadFileError(
            f"{path}: is a part of a cached repository, expected its snapshot {wanted}"
        )
    if chosen is None:
        names = ", ".join(item.name for item in found[:MAX_LISTED])
        raise BadFileError(
            f"{path}: is a cached repository with {len(found)} snapshots, expected one of them, "
            f"in {shown / 'snapshots'}: {names}"
        )
    return shown / "snapshots" / chosen.name


def cached_models(path: Path) -> list[Path]:
    """The repositories of models in a cache, or in the home directory of one."""
    for place in (path, path / "hub"):
        found = sorted(item for item in _directories(place) if _is_repository(item))
        if found:
            return found
    return []


def local_snapshot(name: str) -> Path | None:
    """Where the user's own cache has a model, by its name on the hub."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    place = (
        Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
    )
    try:
        return find_snapshot(place) if place.is_dir() else None
    except MsQuantError:
        return None


def refuse_cached_place(output: Path, what: str = "output") -> None:
    """Refuses to write into a hub's cache, whose files belong to the program that downloads.

    Raises:
        MsQuantError: the directory would lie in one.
    """
    for path in dict.fromkeys((output.absolute(), output.resolve())):
        for place in (path, *path.parents):
            if _is_repository(place):
                raise BadFileError(
                    f"{output}: the {what} directory lies in {place}, a hub's cache, expected a "
                    "directory apart from it"
                )


def _is_repository(place: Path) -> bool:
    named = _REPOSITORY.fullmatch(place.name) is not None
    return named and any((place / name).is_dir() for name in ("snapshots", "blobs", "refs"))


def _directories(place: Path) -> list[Path]:
    return [item for item in place.iterdir() if item.is_dir()] if place.is_dir() else []


def _main(root: Path, snapshots: list[Path]) -> Path | None:
    """The snapshot that the main branch was at, if it is one of those that are there."""
    path = root / "refs" / "main"
    if not path.is_file() or path.stat().st_size > 1 << 10:
        return None
    name = path.read_bytes().decode("ascii", "replace").strip()
    return next((item for item in snapshots if item.name == name), None)
