"""Files beside a finished checkpoint that its record does not list.

Hubs add a card, a ``.gitattributes``, a ``configuration.json`` or a cache; nothing reads them when
the checkpoint is served. What a runtime would read is another matter: it decides what is served.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ms_quant.files.strict_json import read_json
from ms_quant.job.output_directory import MAX_RECORD_BYTES, RECORD

MAX_NAMED = 8
CODE_AND_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".py", ".so")
SETTINGS = (
    r"(config|generation_config|params|modules|tekken|vocab|added_tokens|special_tokens_map)\.json",
    r"(adapter|processor|(video_|image_)?preprocessor|hf_quant|quantize|quant)_config\.json",
    r"(config_)?sentence_(bert_config|transformers)\.json",
    r"(tokenizer.*|chat_template.*|.*\.index|.*quant\w*_description\w*)\.json",
    r"(vocab|merges)\.txt|.*\.(model|tiktoken|spm|jinja)",
)
PLACES = r"rank_\d+|proof|tensors|optional"  # directories that a layout of ours has
MODULES = r"\d+_\w+/[^/]+\.(json|safetensors|bin)|additional_chat_templates/[^/]+\.jinja"
_SETTINGS = re.compile("|".join(SETTINGS), re.IGNORECASE)
_PLACES, _MODULES = re.compile(PLACES), re.compile(MODULES)


@dataclass(frozen=True)
class Unlisted:
    """What a record does not list, as paths in the checkpoint.

    Attributes:
        loaded: weights and code, and what lies where a rank's tensors do.
        settings: other files that a runtime or a tokenizer reads.
        others: what nothing reads; of a directory that nothing reads its name and a slash.
    """

    loaded: tuple[str, ...]
    settings: tuple[str, ...]
    others: tuple[str, ...]


def is_read(name: str) -> bool:
    """Whether a runtime reads a file of a checkpoint, by its path in it, with ``/``."""
    pattern = _MODULES if "/" in name else _SETTINGS
    return _is_loaded(name) or (not name.startswith(".") and bool(pattern.fullmatch(name)))


def unlisted(directory: Path) -> Unlisted:
    """Files, in subdirectories too, that the record does not list.

    Raises:
        MsQuantError: there is no record, or it is not JSON.
    """
    listed = read_json(directory / RECORD, MAX_RECORD_BYTES).get("files")
    known = {RECORD, *(listed if isinstance(listed, dict) else ())}
    names = [name for name in _walk(directory, known) if name not in known]
    loaded = tuple(name for name in names if _is_loaded(name))
    settings = tuple(name for name in names if is_read(name) and name not in loaded)
    return Unlisted(loaded, settings, tuple(name for name in names if not is_read(name)))


def unlisted_problems(directory: Path, notes: list[str], *, serving: bool = False) -> list[str]:
    """What a runtime would read and the record does not list, one line each.

    Args:
        directory: the checkpoint.
        notes: gets a sentence about the rest.
        serving: whether only weights and code are problems: a tokenizer may have been added.

    Raises:
        MsQuantError: there is no record, or it is not JSON.
    """
    found = unlisted(directory)
    kept = found.settings if serving else ()
    for names, what in ((kept, "may be read"), (found.others, "read by no runtime")):
        if names:
            verb = "is" if len(names) == 1 else "are"
            notes.append(f"{directory}: {named(names)} {verb} not listed in {RECORD} and {what}")
    wrong = found.loaded if serving else found.loaded + found.settings
    return [
        f"{directory / name}: not listed in {RECORD}, expected no other file that a runtime reads"
        for name in sorted(wrong)
    ]


def named(names: Sequence[str], most: int = MAX_NAMED) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _is_loaded(name: str) -> bool:
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts):
        return False
    if len(path.parts) == 1:
        return path.suffix.lower() in CODE_AND_WEIGHTS or bool(_PLACES.fullmatch(name))
    return bool(_PLACES.fullmatch(path.parts[0]))


def _walk(directory: Path, known: set[str]) -> Iterator[str]:
    """Every file; of a directory in which nothing is read or listed only its name."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if not entry.is_dir() or entry.is_symlink():
            yield entry.name
            continue
        start = f"{entry.name}/"
        files = sorted(_files(Path(entry.path), start))
        if any(name in known or is_read(name) for name in files):
            yield from files
        elif files:
            yield start


def _files(directory: Path, start: str) -> Iterator[str]:
    for path, inner, names in os.walk(directory):
        inside = Path(path).relative_to(directory)
        links = [name for name in inner if Path(path, name).is_symlink()]
        yield from (start + (inside / name).as_posix() for name in names + links)
