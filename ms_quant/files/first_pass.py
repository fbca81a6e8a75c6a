"""One pass over a whole float model before any work: every value is finite, every tensor hashed.
Of a tensor that is stored as codes and scales these are.

A job takes hours and reads each tensor when its block comes; without this pass a NaN in the last
block would end it there, and a file that was repaired in between would give two models in one. What
the pass found is in the job's directory, so that it is not done again; then each tensor is hashed
once more when it is read first, as nothing else shows that its bytes are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ms_quant.files.digest import file_stamp, tensor_digest
from ms_quant.files.reader import ChangedSourceError, Checkpoint
from ms_quant.files.safetensors_file import SafetensorsFile
from ms_quant.files.sealed import read_sealed, write_sealed
from ms_quant.progress import PartProgress, silent

STATE = "source.json"
MAX_STATE_BYTES = 256 << 20
SAVED_BYTES = 4 << 30  # a killed pass reads at most so much again
WORKERS = 4
_NOTHING: dict[str, Any] = {"stamp": None, "tensors": {}, "before": {}}


@dataclass(frozen=True)
class SourceHashes:
    """What the pass found.

    Attributes:
        digests: sha256 of each float tensor's bytes.
        trusted: those that this pass has not read itself, as their files look untouched.
    stamps: file name to what it looked like.
    """

    digests: dict[str, str]
    trusted: frozenset[str]
    stamps: dict[str, list[int]]


def read_source(
    checkpoint: Checkpoint,
    directory: Path,
    progress: PartProgress = silent,
) -> SourceHashes:
    """Reads every float tensor, or what an interrupted pass has left of them.

    Args:
        checkpoint: the float model.
        directory: where the state of the pass is, which exists.
        progress: told how much is read, 0 to 1.

    Raises:
        MsQuantError: a tensor holds NaN or infinity, or is not what an earlier pass has read; or
            the disk does not take the state.
    """
    path = directory / STATE
    old = _shards(read_sealed(path, MAX_STATE_BYTES) or {})
    new: dict[str, dict[str, Any]] = {}
    digests, trusted = dict[str, str](), set[str]()
    todo = []
    for file in [checkpoint.shard(path.name) for path in checkpoint.files()]:
        entry, stamp = old.get(file.path.name, _NOTHING), file_stamp(file.path)
        names = sorted(checkpoint.hashed_in(file), key=lambda name: file.info(name).start)
        known = entry["tensors"] if entry["stamp"] == stamp else {}
        kept = {name: known[name] for name in names if name in known}
        left = [name for name in names if name not in kept]
        before = {**entry["before"], **entry["tensors"]}
        before = {name: before[name] for name in left if name in before}
        new[file.path.name] = {"stamp": stamp, "tensors": kept, "before": before}
        digests |= kept
        trusted |= kept.keys()
        todo += [(file, name) for name in left]
    _Pass(checkpoint, path, new, digests, progress).run(todo)
    stamps = {name: entry["stamp"] for name, entry in new.items()}
    return SourceHashes(digests, frozenset(trusted), stamps)


@dataclass
class _Pass:
    """Attributes:
    checkpoint: the model.
    path: the file of the state.
    shards: file name to its ``stamp``, the digests of its ``tensors``, which are added, and those
        that tensors had ``before`` the file changed, which go once they are found to be the same.
    digests: those of all tensors; they are added, too.
    """

    checkpoint: Checkpoint
    path: Path
    shards: dict[str, dict[str, Any]]
    digests: dict[str, str]
    progress: PartProgress

    def run(self, todo: Sequence[tuple[SafetensorsFile, str]]) -> None:
        """Reads tensors, several at a time, and keeps what is known in the order of the files."""
        sizes = [_size(file, name) for file, name in todo]
        total, done, saved = sum(sizes), 0, 0
        pool = ThreadPoolExecutor(WORKERS)
        try:
            found = pool.map(lambda one: self._read(*one), todo)
            for (file, name), size, digest in zip(todo, sizes, found, strict=True):
                shard = self.shards[file.path.name]
                if shard["before"].pop(name, digest) != digest:
                    raise ChangedSourceError(f"{file.path}: tensor {name!r}")
                shard["tensors"][name] = self.digests[name] = digest
                done += size
                self.progress(done / total if total else 1.0)
                if done - saved >= SAVED_BYTES:
                    saved = done
                    self._save()
        finally:
            pool.shutdown(cancel_futures=True)
        if todo:
            self._save()

    def _read(self, file: SafetensorsFile, name: str) -> str:
        digest = tensor_digest(file, name)
        self.checkpoint.check_part(name)
        return digest

    def _save(self) -> None:
        write_sealed(self.path, {"shards": self.shards})


def _size(file: SafetensorsFile, name: str) -> int:
    info = file.info(name)
    return info.stop - info.start


def _shards(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of a state that are as they should be; the others are read again."""
    found = state.get("shards")
    items: Iterator[tuple[str, Any]] = iter(found.items() if isinstance(found, dict) else ())
    return {
        name: entry
        for name, entry in items
        if isinstance(entry, dict)
        and entry.keys() == _NOTHING.keys()
        and all(isinstance(entry[key], dict) for key in ("tensors", "before"))
    }
