"""The job directory: what makes a long quantization survive being killed.

    job.json                 what the job computes; resuming under another one is refused
    block-00000.safetensors  the quantized linears of a finished block; further formats of the same
                             job have block-00000.1.safetensors and so on
    hidden-00001.npy         float32 (windows, tokens, hidden), the input of a block
    probe-00001.npy          of an analysis, the inputs of a block, some group before it quantized
    source.json              the hash of every tensor of the source, as the first pass read it
    ms_quant.lock            empty; locked by the process that works here

Every file appears under its name only when it is whole and on disk. A block is finished when its
file is there; blocks finish in any order. Of the hidden states those stay that some unfinished
block begins with.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant import kernels
from ms_quant.errors import JobConflictError
from ms_quant.files.atomic import disk_errors, write_json
from ms_quant.files.lock import locked
from ms_quant.files.own import require_own_directory, require_own_file
from ms_quant.files.strict_json import read_json
from ms_quant.job.block_files import BLOCK_NAME, BlockFiles
from ms_quant.schemes.records import Scheme

LOCK = "ms_quant.lock"
_STATES = r"(hidden|probe|stream)-\d{5,}\.npy|given-\d{5,}-\d{5,}\.npy"
_WORK = rf"(({BLOCK_NAME}|(routes|seen|maxima)-\d{{5,}})\.safetensors|{_STATES}|source\.json)"
_OF_BLOCK = r"(block|stream|routes|seen|maxima|given)-(\d{5,})"
_TEMPORARY = re.compile(rf"\.(job\.json|{_WORK})\.\d+\.tmp")
_OURS = re.compile(rf"job\.json|{_WORK}|{_TEMPORARY.pattern}")
_CPU_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
)


def environment(with_mindspore: bool = False) -> dict[str, Any]:
    """What calibrated results depend on besides arguments: versions, CPU, kernels and threads.

    Args:
        with_mindspore: whether they depend on MindSpore, too.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        **({"mindspore": _mindspore_version()} if with_mindspore else {}),
        "numpy": np.__version__,
        "cpu": " ".join([platform.machine(), *_cpu_features()]),
        "kernels": kernels.best_isa() if kernels.available() else "none",
        "threads": threads,
    }


def _mindspore_version() -> str:
    try:
        return version("mindspore")  # importing it takes a second, and a dry run needs no more
    except PackageNotFoundError:  # a build under another name
        import mindspore

        return mindspore.__version__


def _cpu_features() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return []
    for line in cpuinfo.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return [name for name in _CPU_FEATURES if name in line.split()]
    return []


def find_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two records differ: (dotted path, old value, new value)."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            found = find_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    return None if old == new else (path, old, new)


def explain_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], verb: str, any_environment: bool
) -> tuple[str, str] | None:
    """How two records differ.

    Args:
        old: the record on disk.
        new: the record of the request.
        verb: what was done with the old one, such as ``"begun"``.
        any_environment: do not compare the ``environment`` entries.

    Returns:
        The dotted path of the first difference and a clause about it, or None.
    """
    if any_environment:
        old, new = {**old, "environment": None}, {**new, "environment": None}
    found = find_difference(old, new)
    if not found:
        return None
    path, before, after = found
    if path.startswith("source"):
        file = _changed_file(old.get("source"), new.get("source"))
        return path, f"the source model changed since it was {verb} ({file} differs)"
    if path == "calibration.sha256":
        return path, f"the calibration tokens changed since it was {verb}"
    return path, f"it was {verb} with {path} = {before!r}, now {path} is {after!r}"


def _changed_file(old: Any, new: Any) -> str:
    """The first file of a model in which two of its fingerprints differ."""
    before, after = ((part or {}).get("shards") or {} for part in (old, new))
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            return name
    return "config.json"


class JobDirectory(BlockFiles):
    """A job on disk, new or begun. Nothing is written before :meth:`open`.

    Args:
        directory: where it is or will be.
        record: what the job computes, as JSON. Its ``environment`` entry may differ when
            `any_environment` is set.
        any_environment: go on under other versions, CPU or thread count.
        unknown: entries that a job has and this record does not have yet; they are not compared.
        scheme_of: what a linear, by its full path, becomes; None of a job whose blocks hold none.
        target: which of the formats that one job is for; each has block files of its own. Those
            of the first, 0, are written last, and say that a block is finished.

    Raises:
        MsQuantError: the directory holds a job with another record, or is no job at all.
    """

    def __init__(
        self,
        directory: Path,
        record: Mapping[str, Any],
        any_environment: bool = False,
        unknown: Sequence[str] = (),
        scheme_of: Callable[[str], Scheme] | None = None,
        target: int = 0,
    ):
        super().__init__(directory, scheme_of, target)
        self.record = json.loads(json.dumps(record))
        self.any_environment, self.unknown = any_environment, unknown
        self._check()

    def _check(self) -> None:
        if self.directory.is_symlink():
            require_own_directory(self.directory)
        state = self.directory / "job.json"
        require_own_file(state)
        if state.exists():
            self._compare(read_json(state))
        elif self.directory.exists() and not self._is_new():
            raise JobConflictError(
                f"{self.directory}: exists but holds no job, expected a new directory"
            )
        for path in self.directory.iterdir() if self.directory.exists() else ():
            if path.name == LOCK or _OURS.fullmatch(path.name):
                require_own_file(path)

    def _is_new(self) -> bool:
        """Whether the directory holds nothing but what a killed beginning or end left."""
        return self.directory.is_dir() and all(
            path.is_file() and (_TEMPORARY.fullmatch(path.name) or _is_lock(path))
            for path in self.directory.iterdir()
        )

    def _compare(self, old: Mapping[str, Any]) -> None:
        unknown = {key: old.get(key, "to be found") for key in self.unknown}
        new = {**self.record, **unknown}
        found = explain_difference(old, new, "begun", self.any_environment)
        if not found:
            return
        path, clause = found
        hint = "finish it with its own arguments, or delete the directory to start again"
        if path.startswith("environment"):
            hint = "use --any-environment to go on; the bytes may differ from an undisturbed run"
        elif path.startswith("source"):
            hint = "delete the directory to start again"
        raise JobConflictError(f"{self.directory}: {clause}; {hint}")

    @contextmanager
    def open(self) -> Iterator[None]:
        """Makes the directory or goes on in it; until the end no other process can.

        Raises:
            MsQuantError: another process works on the job, or the directory cannot be written.
        """
        with disk_errors(self.directory, "the job directory"):
            self.directory.mkdir(parents=True, exist_ok=True)
        self._check()
        with locked(self.directory / LOCK):
            self._check()
            with disk_errors(self.directory, "the job directory"):
                for path in self._files(_TEMPORARY):
                    path.unlink()
            if not (self.directory / "job.json").exists():
                write_json(self.directory / "job.json", self.record)
            yield

    def _files(self, names: re.Pattern[str]) -> list[Path]:
        found = sorted(path for path in self.directory.iterdir() if names.fullmatch(path.name))
        return [path for path in found if path.is_file()]

    def hidden_file(self, index: int) -> Path:
        return self.directory / f"hidden-{index:05d}.npy"

    def stream_file(self, index: int) -> Path:
        """The residual stream within a block, before its experts."""
        return self.directory / f"stream-{index:05d}.npy"

    def routes_file(self, index: int) -> Path:
        """Which tokens go to which expert of a block."""
        return self.directory / f"routes-{index:05d}.safetensors"

    def seen_file(self, index: int) -> Path:
        """What was seen of a block before its experts."""
        return self.directory / f"seen-{index:05d}.safetensors"

    def maxima_file(self, index: int) -> Path:
        """The largest magnitudes of what all experts of a block read and of their weights."""
        return self.directory / f"maxima-{index:05d}.safetensors"

    def given_file(self, index: int, expert: int) -> Path:
        """What an expert gives to the tokens that go to it."""
        return self.directory / f"given-{index:05d}-{expert:05d}.npy"

    def probe_file(self, index: int) -> Path:
        return self.directory / f"probe-{index:05d}.npy"

    def hidden_bytes(self) -> int:
        """The size of the hidden states there are."""
        return sum(path.stat().st_size for path in self.directory.glob("hidden-*.npy"))

    def made_of(self, path: Path) -> list[Path]:
        """What has to be made again with a file of this job.

        Returns:
            The file alone where hidden states enter a block, which are made of those before; all
            files of its block where it is one of a block; else nothing.
        """
        if re.fullmatch(r"hidden-\d{5,}\.npy", path.name):
            return [path]
        found = re.fullmatch(rf"{_OF_BLOCK}(.*)", path.name)
        if not found:
            return []
        of_block = re.compile(rf"{_OF_BLOCK}([-.].*)?")
        matches = ((of_block.fullmatch(other.name), other) for other in self._files(_OURS))
        return [other for match, other in matches if match and match[2] == found[2]]

    def remove(self) -> None:
        """Deletes the job's own files, and the directory when nothing else is in it.

        The record goes last, so a kill in between leaves a job.
        """
        for path in sorted(self._files(_OURS), key=lambda path: path.name == "job.json"):
            path.unlink()
        (self.directory / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # there are files of someone else
            self.directory.rmdir()


def _is_lock(path: Path) -> bool:
    return path.name == LOCK and path.stat().st_size == 0
