"""What a path given as a model is: the directory to read, or one sentence that says what it is.

``KINDS`` is the table of directories that hold something else than a Hugging Face checkpoint.
Nothing is downloaded or converted; nothing that a file holds is executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.files.hub_cache import (
    cached_models,
    download_command,
    find_snapshot,
    hub_id,
    local_snapshot,
    repository,
    repository_id,
)
from ms_quant.files.strict_json import read_json
from ms_quant.job.unlisted import named

MAX_DEPTH, MAX_LOOKED_AT = 4, 1000  # how far a model is looked for in subdirectories
HEAD_BYTES = 64
ADAPTER = "adapter_*.safetensors"
CONSOLIDATED = "consolidated*.safetensors"
PICKLE = ("*.bin", "*.pt", "*.pth")
FOREIGN = ("*.h5", "*.msgpack", "openvino_model*", "*.npz", "*.tflite")
CONVERTED = "load it with transformers and save it with save_pretrained(safe_serialization=True)"
HF = "expected the directory of a Hugging Face checkpoint with safetensors files"
_SHARD = re.compile(r"(.*?)(\d{5})-of-(\d{5})\.safetensors")
POINTER, HTML = b"version https://git-lfs", (b"<!doctype html", b"<html")


class Found(NamedTuple):
    """Attributes:
    directory: the model directory to read.
    notes: what to know about it, one sentence each.
    """

    directory: Path
    notes: list[str]


@dataclass(frozen=True)
class Listing:
    """The names in a directory."""

    directory: Path
    files: tuple[str, ...]
    directories: tuple[str, ...]

    def some(self, *patterns: str) -> list[str]:
        """The files that match a pattern, whatever their case; hidden ones never do."""
        seen = [name for name in self.files if not name.startswith(".")]
        return [name for name in seen if any(fnmatch(name.lower(), p) for p in patterns)]

    def inside(self, pattern: str) -> list[str]:
        """The subdirectories whose names match a regular expression."""
        return [name for name in self.directories if re.fullmatch(pattern, name)]

    @property
    def unfinished(self) -> bool:
        """Whether it is where a command works, such as ``OUTPUT.job``."""
        partial = self.directory.absolute().name.endswith(".partial")
        return "job.json" in self.files or (partial and "ms_quant.json" in self.files)

    @property
    def pipeline(self) -> bool:
        """Whether it is a pipeline of diffusers; some have a whole model in one file, too."""
        return "model_index.json" in self.files and "config.json" not in self.files

    @property
    def weights(self) -> list[str]:
        """The safetensors files of a whole model, and the directories of its ranks."""
        adapters = set(self.some(ADAPTER))
        found = [name for name in self.some("*.safetensors") if name not in adapters]
        own = [name for name in found if name not in set(self.some(CONSOLIDATED))]
        return own + self.inside(r"rank_\d+") + (found if "config.json" in self.files else [])


class Kind(NamedTuple):
    """A row of ``KINDS``.

    Attributes:
        title: what it is, for the documents.
        applies: whether a directory without a model's safetensors files is one.
        sentence: what it is and what was expected, after the directory's name.
    """

    title: str
    applies: Callable[[Listing], Any]
    sentence: Callable[[Listing], str]


def _says(text: str) -> Callable[[Listing], str]:
    return lambda listing: text


KINDS = (
    Kind("an empty directory", lambda d: not d.files + d.directories, _says(f"is empty, {HF}")),
    Kind(
        "an unfinished job or output of a command",
        lambda d: d.unfinished,
        _says("is what an unfinished job has made, expected a model; the same command finishes it"),
    ),
    Kind(
        "a LoRA adapter",
        lambda d: "adapter_config.json" in d.files or d.some("adapter_*"),
        lambda d: (
            f"is an adapter (LoRA){_base_model(d)} and no whole model, expected a merged one: load "
            "it with peft and save merge_and_unload() with save_pretrained"
        ),
    ),
    Kind(
        "GGUF",
        lambda d: d.some("*.gguf"),
        lambda d: (
            f"holds GGUF files ({named(d.some('*.gguf'), 1)}), which are quantized for "
            f"llama.cpp, {HF} that they were made from"
        ),
    ),
    Kind(
        "a diffusers pipeline",
        lambda d: "model_index.json" in d.files,
        _says(
            "is a pipeline of diffusers, which quantize, verify, inspect and serve-check take, "
            "expected a decoder model here; networks are quantized with "
            "ms_quant.quantize(network, ...)"
        ),
    ),
    Kind(
        "Meta's original layout",
        lambda d: "params.json" in d.files and d.some("consolidated.*"),
        lambda d: (
            "is in the original layout of Meta or Mistral (params.json beside "
            f"{d.some('consolidated.*')[0]}), {HF}: transformers' "
            "convert_llama_weights_to_hf.py or convert_mistral_weights_to_hf.py makes it"
        ),
    ),
    Kind(
        "a checkpoint of DeepSpeed",
        lambda d: d.inside(r"global_step\d+") or "zero_to_fp32.py" in d.files,
        _says(
            "is a training checkpoint of DeepSpeed, expected a whole model: "
            "zero_to_fp32.py . OUTPUT --safe_serialization gathers its weights"
        ),
    ),
    Kind(
        "a sharded checkpoint of FSDP",
        lambda d: d.some("*.distcp") or d.inside(r"pytorch_model_fsdp_\d+"),
        _says(
            "is a sharded training checkpoint (.distcp), expected a whole model: "
            "accelerate merge-weights makes one"
        ),
    ),
    Kind(
        "a checkpoint of Megatron",
        lambda d: "latest_checkpointed_iteration.txt" in d.files or d.inside(r"mp_rank_\d+(_\d+)?"),
        _says(f"is a training checkpoint of Megatron, {HF}: Megatron's converter makes it"),
    ),
    Kind(
        "a trainer's directory",
        lambda d: d.inside(r"checkpoint-\d+"),
        lambda d: (
            "is the directory of a training run, expected one of its checkpoints: "
            + named(sorted(d.inside(r"checkpoint-\d+"), key=_step))
        ),
    ),
    Kind(
        "PyTorch pickle files",
        lambda d: d.some(*PICKLE),
        lambda d: (
            f"holds pickle files ({named(d.some(*PICKLE), 1)}), which are not read, as they "
            f"can run code when they are opened, expected safetensors files: {CONVERTED}"
        ),
    ),
    Kind(
        "MindSpore checkpoints",
        lambda d: d.some("*.ckpt"),
        lambda d: (
            f"holds checkpoints of MindSpore ({named(d.some('*.ckpt'), 1)}), {HF}; networks "
            "are quantized with ms_quant.quantize(network, ...)"
        ),
    ),
    Kind(
        "ONNX",
        lambda d: d.some("*.onnx", "*.onnx_data") or "onnx" in d.directories,
        _says(f"holds a model in ONNX, {HF}"),
    ),
    Kind(
        "TensorFlow, Flax, OpenVINO or MLX files",
        lambda d: d.some(*FOREIGN),
        lambda d: f"holds weights of another framework ({named(d.some(*FOREIGN), 1)}), {HF}",
    ),
    Kind(
        "an unfinished download",
        lambda d: _unfinished(d),
        lambda d: (
            f"holds no weights but an unfinished download ({_unfinished(d)}), expected all "
            f"files of the model; {_again(d.directory)} goes on with it"
        ),
    ),
    Kind(
        "a data set",
        lambda d: d.some("*.parquet", "*.arrow", "dataset_info*.json"),
        _says(f"is a data set, {HF}; data is given with --calib or --text"),
    ),
    Kind(
        "a cache or a directory of several models",
        lambda d: _models_below(d.directory),
        lambda d: (
            "holds no model itself, expected one of those in it: "
            + named([str(path) for path in _models_below(d.directory)])
        ),
    ),
    Kind(
        "a configuration without weights",
        lambda d: "config.json" in d.files,
        lambda d: (
            "has a config.json and found no .safetensors file, expected the weights beside "
            f"it{_or_again(d.directory)}"
        ),
    ),
    Kind(
        "any other directory",
        lambda d: True,
        lambda d: (
            f"holds neither config.json nor weights but {named(d.files + d.directories)}, {HF}"
        ),
    ),
)


def find_model(path: Path) -> Found:
    """The model directory that a path stands for.

    A repository in a hub's cache stands for its snapshot.

    Args:
        path: what was given.

    Raises:
        MsQuantError: it is no directory of a checkpoint; says what it is and what was expected.
    """
    if not path.exists():
        raise BadFileError(_missing(path))
    if not path.is_dir():
        raise BadFileError(_file(path))
    notes = []
    snapshot = find_snapshot(path)
    if snapshot is not None:
        notes.append(f"{path}: is a cached repository, its snapshot {snapshot.name} is read")
        path = snapshot
    listing = _listing(path)
    _refuse_broken(listing)
    other = listing.unfinished or listing.pipeline
    if other or not (listing.weights or _is_described(listing)):
        kind = next(kind for kind in KINDS if kind.applies(listing))
        raise BadFileError(f"{path}: {kind.sentence(listing)}")
    adapters = listing.some(ADAPTER) or listing.some("adapter_config.json")
    if adapters:
        notes.append(
            f"{path / adapters[0]}: is of an adapter (LoRA){_base_model(listing)} beside a whole "
            "model and is not read; merge it first if the model does not hold it yet"
        )
    return Found(path, notes)


def model_directory(path: Path | str) -> Path:
    """The directory of :func:`find_model`.

    Raises:
        MsQuantError: as there.
    """
    return find_model(Path(path)).directory


def _is_described(listing: Listing) -> bool:
    """Whether it is a checkpoint of some tool without weights, which its reader says better."""
    return bool(listing.some("*quant*_description*.json", "ms_quant.json"))


def _listing(directory: Path) -> Listing:
    files: list[str] = []
    directories: list[str] = []
    for path in sorted(directory.iterdir()):
        (directories if path.is_dir() else files).append(path.name)
    return Listing(directory, tuple(files), tuple(directories))


def _refuse_broken(listing: Listing) -> None:
    """Refuses links that lead nowhere, and files that hold something else than their names say."""
    wrong: dict[str, list[str]] = {}
    for name in listing.some("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"):
        what = wrong_content(listing.directory / name)
        if what:
            wrong.setdefault(what, []).append(name)
    _refuse_missing_shards(listing)
    for what, names in wrong.items():
        subject = (
            f"{names[0]} and {len(names) - 1} more are" if len(names) > 1 else f"{names[0]} is"
        )
        raise BadFileError(f"{listing.directory}: {subject} {what}{_or_again(listing.directory)}")


def _refuse_missing_shards(listing: Listing) -> None:
    """Refuses some of several numbered files; where there is an index, it says better which."""
    shards: dict[str, list[int]] = {}
    for name in listing.files:
        match = _SHARD.fullmatch(name)
        if match:
            shards.setdefault(f"{match[1]}{{}}-of-{match[3]}", []).append(int(match[2]))
    for pattern, found in shards.items() if not listing.some("*.safetensors.index.json") else ():
        count = int(pattern.rpartition("-")[2])
        missing = sorted({*range(1, min(count, len(found) + 1) + 1)} - set(found))
        if len(found) < count and missing:
            first = f"{pattern.format(f'{missing[0]:05}')}.safetensors"
            raise BadFileError(
                f"{listing.directory}: has {len(found)} of {count} weight files, expected {first}, "
                f"too{_or_again(listing.directory)}"
            )


def wrong_content(path: Path) -> str:
    """What a file is instead of what it is called."""
    if not path.exists():
        return "a link to a file that is not there, expected the file (an unfinished download?)"
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(POINTER):
        return "a Git LFS pointer, expected the file itself: git lfs pull gets it"
    if head.lstrip().lower().startswith(HTML):
        return "a web page, expected the file itself: the download went wrong"
    if path.suffix.lower() == ".safetensors" and head.startswith((b"GGUF", b"PK\3\4", b"\x80\2")):
        kind = "a GGUF file" if head.startswith(b"GGUF") else "a pickle file of PyTorch"
        return f"{kind} under another name, expected a safetensors file"
    return ""


def _missing(path: Path) -> str:
    text, name = f"{path}: no such model directory", hub_id(path)
    if path.is_symlink():
        return f"{text}, it is a link to {path.readlink()}, which is not there"
    if path.parent.is_dir():
        siblings = [item.name for item in path.parent.iterdir() if item.is_dir()]
        near = get_close_matches(path.name, siblings, 3)
        if near:
            return (
                f"{text}, expected something like {', '.join(str(path.parent / n) for n in near)}"
            )
        if str(path.parent) != ".":
            return text
    if not name:
        return text
    cached = local_snapshot(name)
    if cached is not None:
        return f"{text}; {name} is in the cache of this machine: {cached}"
    folder = name.partition("/")[2]
    return (
        f"{text}, and nothing is downloaded; if it is a model on a hub, get it with: "
        f"{download_command(name)} --local-dir {folder}, then give {folder}"
    )


def _file(path: Path) -> str:
    text = f"{path}: is a file, expected a model directory"
    place = repository(path)
    if place is not None and path.parent.name == "blobs":
        return f"{path}: is a blob of a hub's cache, expected the repository {place}"
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return f"{path}: is a GGUF file, which is quantized for llama.cpp, {HF} it was made from"
    if suffix in (".zip", ".tar", ".gz", ".tgz", ".zst", ".7z"):
        return f"{path}: is an archive, expected a model directory; unpack it first"
    if suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return f"{path}: is a pickle file, which is not read, {HF}: {CONVERTED}"
    if (path.parent / "config.json").is_file():
        return f"{text}: {path.parent}"
    return text


def _base_model(listing: Listing) -> str:
    """The model that an adapter belongs to, where its file says so."""
    try:
        found = read_json(listing.directory / "adapter_config.json").get("base_model_name_or_path")
    except MsQuantError:
        return ""
    return f" of {found!r:.120}" if isinstance(found, str) and found else ""


def _unfinished(listing: Listing) -> str:
    """A file that a download has begun."""
    patterns = ("*.incomplete", "*.part", "*.aria2", "*.crdownload", "*.download")
    begun = listing.some(*patterns)
    for place in (".cache/huggingface/download", "._____temp"):
        below = listing.directory / place
        if below.is_dir() and not begun:
            found = sorted(item for item in below.iterdir() if item.is_file())
            begun = [
                str(f.relative_to(listing.directory))
                for f in found
                if f.suffix == ".incomplete" or place == "._____temp"
            ]
    return begun[0] if begun else ""


def _again(directory: Path) -> str:
    place = repository(directory)
    if place is not None:
        return download_command(repository_id(place))
    return f"{download_command('ORG/NAME')} --local-dir {directory}"


def _or_again(directory: Path) -> str:
    place = repository(directory)
    return (
        "" if place is None else f"; {download_command(repository_id(place))} gets what is missing"
    )


def _models_below(directory: Path) -> list[Path]:
    """Directories of models in a cache or in a directory of several."""
    cached = cached_models(directory)
    return cached or sorted(path.parent for path in _configs(directory, MAX_DEPTH))


def _configs(directory: Path, depth: int) -> Iterator[Path]:
    """The first config.json files below a directory; not all of a large disk is looked at."""
    directories, looked_at = [(directory, 0)], 0
    while directories and looked_at < MAX_LOOKED_AT:
        place, level = directories.pop(0)
        looked_at += 1
        if level and (place / "config.json").is_file():
            yield place / "config.json"
        elif level < depth:
            with suppress(OSError):
                inner = sorted(item for item in place.iterdir() if item.is_dir())
                directories += [(p, level + 1) for p in inner if p.name != ".git"]


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])
