"""Tensors that wait in files of their own for the one that holds them all.

A safetensors file begins with the length of every tensor, and that of a coded weight is known
only when it is coded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from ms_quant.files.atomic import FileRecord, disk_errors
from ms_quant.files.safetensors_file import open_file
from ms_quant.files.writer import TensorPlan, write_file

Arrays = dict[str, np.ndarray]
Tensors = dict[str, tuple[TensorPlan, Callable[[], np.ndarray | Iterator[np.ndarray]]]]
"""Tensors by name: what each will be, and what gives it."""


def whole(arrays: Arrays) -> Tensors:
    """Tensors that are in memory."""
    return {
        name: (TensorPlan(name, array.dtype, array.shape), partial(arrays.__getitem__, name))
        for name, array in arrays.items()
    }


def stored(path: Path) -> Tensors:
    """The tensors of a file, each read when it is asked for."""
    file = open_file(path)
    return {
        name: (TensorPlan(name, info.dtype, info.shape), partial(file.read, name))
        for name, info in file.tensors.items()
    }


def write_tensors(
    path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Writes a safetensors file, a tensor at a time."""
    plans = [plan for plan, _ in tensors.values()]
    return write_file(path, plans, lambda plan: tensors[plan.name][1](), metadata)


def remove(files: Iterable[Path], directory: Path) -> None:
    """Deletes the files that waited, and their directory."""
    with disk_errors(directory, "its end"):
        for path in files:
            path.unlink(missing_ok=True)
        if directory.is_dir():
            directory.rmdir()
