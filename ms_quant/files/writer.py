"""Safetensors files and their index, written deterministically, a tensor or less at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, UnsupportedError
from ms_quant.files.atomic import ANY_MODE, FileRecord, atomic_file, write_json
from ms_quant.files.safetensors_file import CODES, LENGTH_BYTES, MAX_HEADER_BYTES

INDEX_NAME = "model.safetensors.index.json"
ALIGNMENT = 8
Array = np.ndarray | Iterable[np.ndarray]
"""A tensor, whole or in pieces along its rows."""

__all__ = [
    "FileRecord",
    "TensorPlan",
    "plan_shards",
    "shard_names",
    "write_file",
    "write_index",
]


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What a tensor will be, known before its numbers are.

    Attributes:
        name: its name.
        dtype: as stored.
        shape: as stored.
        part: of a quantized linear, its path and what of it this is; else None.
        source: the model's own float tensor that this is, where that has another name; or "".
        make: its value from this and from what holds the model's numbers; many tensors share one.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    part: tuple[str, str] | None = None
    source: str = ""
    make: Callable[[TensorPlan, Any], Array] | None = field(default=None, compare=False, repr=False)

    @property
    def bytes(self) -> int:
        """The size of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def value(self, numbers: Any) -> Array:
        """Its value, whole or in pieces along the rows, from what holds the model's numbers."""
        assert self.make is not None, self.name
        return self.make(self, numbers)


def plan_shards(tensors: Sequence[TensorPlan], shard_bytes: int) -> list[list[TensorPlan]]:
    """Divides tensors, in the given order, into shards of bounded data size.

    Args:
        tensors (Sequence[TensorPlan]): the tensors; neighbours stay together where they fit.
        shard_bytes (int): the most data of a shard; a larger tensor gets a shard of its own.

    Returns:
        list[list[TensorPlan]], at least one shard, none of them empty unless `tensors` is.

    Raises:
        MsQuantError: `shard_bytes` is not positive, or a name is planned twice.
    """
    if shard_bytes <= 0:
        raise BadFileError(f"shard_bytes is {shard_bytes}, expected a positive number")
    _refuse_duplicates(tensors, "the checkpoint")
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for plan in tensors:
        if shards[-1] and filled + plan.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(plan)
        filled += plan.bytes
    return shards


def shard_names(prefix: str, count: int) -> list[str]:
    """The usual names: ``PREFIX-00001-of-0000N.safetensors``.

    Args:
        prefix (str): how each name begins.
        count (int): how many shards there are.

    Returns:
        list[str], the names in order.
    """
    return [f"{prefix}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_file(
    path: Path | str,
    plans: Sequence[TensorPlan],
    get: Callable[[TensorPlan], Array],
    metadata: Mapping[str, str] | None = None,
    mode: int = ANY_MODE,
) -> FileRecord:
    """Writes one safetensors file atomically. The order of `plans` does not matter.

    Wide dtypes come first, then names in order: so every tensor is aligned to its own item size,
    which readers that map the file need, and the bytes depend on nothing else. The header lists
    the names in order and is padded to a multiple of 8 bytes.

    Args:
        path (Path | str): the final name.
        plans (Sequence[TensorPlan]): the tensors.
        get (Callable[[TensorPlan], numpy.ndarray | Iterable[numpy.ndarray]]): gives the array of a
            plan, or its rows in pieces. It is called once for each tensor, in the order of the
            file; only one array or piece is held at a time.
        metadata (Mapping[str, str], optional): the ``__metadata__`` of the header.
        mode (int): the widest permissions that the file gets.

    Returns:
        FileRecord, name, size and SHA-256.

    Raises:
        MsQuantError: two plans share a name, an array differs from its plan, a dtype cannot be
            stored, or the disk is full. No file is left.
    """
    path = Path(path)
    header, layout = file_layout(plans, path, metadata)
    with atomic_file(path, mode) as sink:
        sink.write(header, "the header")
        for plan in layout:
            for piece in checked_pieces(get(plan), plan, path):
                sink.write(piece, f"tensor {plan.name!r}")
    return sink.record()


def file_layout(
    plans: Sequence[TensorPlan], path: Path, metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[TensorPlan]]:
    """The beginning of the file of :func:`write_file`, and its tensors in their order.

    Raises:
        MsQuantError: two plans share a name, or a dtype cannot be stored.
    """
    _refuse_duplicates(plans, str(path))
    layout = sorted(plans, key=lambda plan: (-plan.dtype.itemsize, plan.name))
    return _header(layout, metadata, path), layout


def write_index(
    directory: Path | str,
    shards: Mapping[str, Sequence[TensorPlan]],
    total_size: int,
    name: str = INDEX_NAME,
) -> FileRecord:
    """Writes the index of a sharded checkpoint atomically.

    Args:
        directory (Path | str): where the shards are.
        shards (Mapping[str, Sequence[TensorPlan]]): shard file name to the tensors in it.
        total_size (int): the bytes of all tensors.
        name (str): the file name of the index.

    Returns:
        FileRecord, name, size and SHA-256.

    Raises:
        MsQuantError: a tensor is in two shards, or the disk is full.
    """
    path = Path(directory) / name
    _refuse_duplicates([plan for plans in shards.values() for plan in plans], str(path))
    shard_of = {plan.name: shard for shard, plans in shards.items() for plan in plans}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(shard_of.items()))}
    return write_json(path, index)


def _refuse_duplicates(plans: Sequence[TensorPlan], where: str) -> None:
    seen: set[str] = set()
    for plan in plans:
        if plan.name in seen:
            raise BadFileError(f"{where}: tensor {plan.name!r} is planned twice, expected once")
        seen.add(plan.name)


def _header(layout: Sequence[TensorPlan], metadata: Mapping[str, str] | None, path: Path) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    for plan in layout:
        if plan.dtype not in CODES or plan.name == "__metadata__":
            raise UnsupportedError(
                f"{path}: tensor {plan.name!r} of dtype {plan.dtype} cannot be stored, "
                f"expected one of {', '.join(map(str, CODES))}"
            )
        entries[plan.name] = {
            "dtype": CODES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [offset, offset + plan.bytes],
        }
        offset += plan.bytes
    first = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    header = {**first, **dict(sorted(entries.items()))}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise BadFileError(
            f"{path}: the header needs {len(text)} bytes, expected at most {MAX_HEADER_BYTES}"
        )
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def checked_pieces(tensor: Array, plan: TensorPlan, path: Path) -> Iterator[memoryview]:
    """The bytes of a tensor, whole or in pieces of some rows, in C order.

    Raises:
        MsQuantError: it is not as planned.
    """
    if isinstance(tensor, np.ndarray):
        _check_array(tensor.dtype, tensor.shape, plan, path)
        yield _bytes(tensor)
        return
    rows = 0
    for piece in tensor:
        _check_array(piece.dtype, (*plan.shape[:1], *piece.shape[1:]), plan, path)
        rows += len(piece)
        yield _bytes(piece)
    _check_array(plan.dtype, (rows, *plan.shape[1:]), plan, path)


def _check_array(
    dtype: np.dtype[Any], shape: tuple[int, ...], plan: TensorPlan, path: Path
) -> None:
    if (dtype, shape) != (plan.dtype, plan.shape):
        raise BadFileError(
            f"{path}: tensor {plan.name!r} is {dtype} {list(shape)}, expected "
            f"{plan.dtype} {list(plan.shape)}"
        )


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
