"""The job directory: what makes a long quantization survive being killed.

    job.json                 what the job computes; resuming under another one is refused
    block-00000.safetensors  the int8 linears of a finished block
    hidden-00001.npy         float32 (sequences, tokens, hidden), the input of the next block

Every file appears under its name only when it is whole and on disk. A block is finished when its
file is there; the next block's input is written before it and this block's is deleted after it,
so the input of the first unfinished block always exists.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.checkpoint.atomic import disk_errors, sync_directory, write_json
from ms_quant.checkpoint.safetensors_file import open_file
from ms_quant.checkpoint.writer import TensorPlan, write_file
from ms_quant.errors import MsQuantError
from ms_quant.models.config import read_json
from ms_quant.numerics.linear import QuantizedLinear, StaticActivation

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


def environment() -> dict[str, Any]:
    """What calibrated results depend on besides the arguments: versions, CPU and threads."""
    import mindspore

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "mindspore": mindspore.__version__,
        "numpy": np.__version__,
        "cpu": " ".join([platform.machine(), *_cpu_features()]),
        "threads": threads,
    }


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


class JobDirectory:
    """A job on disk, created or resumed.

    Args:
        directory: where it is or will be.
        record: what the job computes, as JSON. Its ``environment`` entry may differ when
            `any_environment` is set.
        any_environment: go on under other versions, CPU or thread count.

    Raises:
        MsQuantError: the directory holds a job with another record, or is no job at all.
    """

    def __init__(self, directory: Path, record: Mapping[str, Any], any_environment: bool = False):
        self.directory = directory
        state = directory / "job.json"
        record = json.loads(json.dumps(record))
        if state.exists():
            self._check(read_json(state), record, any_environment)
        elif directory.exists() and any(_visible(directory)):
            raise MsQuantError(f"{directory}: exists but holds no job, expected a new directory")
        with disk_errors(directory, "the job directory"):
            directory.mkdir(parents=True, exist_ok=True)
            remove_temporaries(directory)
        if not state.exists():
            write_json(state, record)

    def _check(self, old: Mapping, new: Mapping, any_environment: bool) -> None:
        if any_environment:
            old, new = {**old, "environment": None}, {**new, "environment": None}
        found = find_difference(old, new)
        if not found:
            return
        path, before, after = found
        hint = "finish it with its own arguments, or delete the directory to start again"
        if path.startswith("environment"):
            hint = "use --any-environment to go on; the bytes may differ from an undisturbed run"
        raise MsQuantError(
            f"{self.directory}: this job was begun with {path} = {before!r}, "
            f"now {path} is {after!r}; {hint}"
        )

    def block_file(self, index: int) -> Path:
        return self.directory / f"block-{index:05d}.safetensors"

    def hidden_file(self, index: int) -> Path:
        return self.directory / f"hidden-{index:05d}.npy"

    def finished_blocks(self) -> int:
        """How many blocks are finished; blocks finish in order."""
        count = 0
        while self.block_file(count).exists():
            count += 1
        return count

    def finish_block(
        self,
        index: int,
        linears: Mapping[str, QuantizedLinear],
        statistics: Mapping[str, np.ndarray],
        notes: Mapping[str, Any],
    ) -> None:
        """Commits a block: its int8 linears, per-channel statistics and what was chosen."""
        tensors = dict(statistics)
        for path, linear in linears.items():
            tensors.update({f"{path}.{key}": value for key, value in _to_tensors(linear).items()})
        plans = [TensorPlan(name, array.dtype, array.shape) for name, array in tensors.items()]
        metadata = {"notes": json.dumps(notes, sort_keys=True)}
        write_file(self.block_file(index), plans, tensors.__getitem__, metadata)
        self.hidden_file(index).unlink(missing_ok=True)

    def linear(self, index: int, path: str) -> QuantizedLinear:
        """An int8 linear of a finished block, without its bias."""
        file = open_file(self.block_file(index))
        activation = None
        if f"{path}.input_scale" in file.tensors:
            activation = StaticActivation(
                file.read(f"{path}.act_scale")[0],
                int(file.read(f"{path}.input_offset")[0]),
                file.read(f"{path}.input_scale"),
            )
        return QuantizedLinear(
            file.read(f"{path}.weight"), file.read(f"{path}.weight_scale"), None, activation
        )

    def statistic(self, index: int, name: str) -> np.ndarray:
        return open_file(self.block_file(index)).read(name)

    def notes(self, index: int) -> dict[str, Any]:
        return json.loads(open_file(self.block_file(index)).metadata["notes"])

    def remove(self) -> None:
        """Deletes the directory; the record goes last, so a kill in between leaves a job."""
        for path in sorted(_visible(self.directory), key=lambda path: path.name == "job.json"):
            path.unlink()
        shutil.rmtree(self.directory)


def _to_tensors(linear: QuantizedLinear) -> dict[str, np.ndarray]:
    tensors = {"weight": linear.weight, "weight_scale": linear.weight_scale}
    if linear.activation is not None:
        tensors["act_scale"] = np.array([linear.activation.scale], np.float32)
        tensors["input_offset"] = np.array([linear.activation.offset], np.int8)
        tensors["input_scale"] = linear.activation.input_scale
    return tensors


def _visible(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if not path.name.startswith(".")]


def remove_temporaries(directory: Path) -> None:
    """Deletes what a killed process left under temporary names."""
    for path in directory.rglob(".*.tmp"):
        path.unlink()


def is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


class HiddenStates:
    """Hidden states on disk, written row by row and renamed when whole.

    Args:
        path: the final name.
        shape: (sequences, tokens, hidden).
    """

    def __init__(self, path: Path, shape: tuple[int, ...]):
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with disk_errors(path, "hidden states"):
            header = np.lib.format.header_data_from_array_1_0(np.empty((0,), np.float32))
            self.file = self.temporary.open("wb")
            np.lib.format.write_array_header_1_0(self.file, {**header, "shape": shape})

    def append(self, rows: np.ndarray) -> None:
        with disk_errors(self.path, "hidden states"):
            self.file.write(np.ascontiguousarray(rows, np.float32).data)

    def commit(self) -> None:
        with disk_errors(self.path, "hidden states"):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.temporary.replace(self.path)
            sync_directory(self.path.parent)


def read_hidden(path: Path, start: int, stop: int) -> np.ndarray:
    """Sequences ``start`` to ``stop - 1``, float32, copied out of the file."""
    return np.array(np.load(path, mmap_mode="r", allow_pickle=False)[start:stop])
