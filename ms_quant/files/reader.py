"""A checkpoint directory: one safetensors file or several with an index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from ms_quant.errors import BadFileError, JobConflictError
from ms_quant.files.atomic import sha256_file
from ms_quant.files.digest import (
    CHUNK_ELEMENTS,
    count_non_finite,
    file_stamp,
    row_chunks,
    shard_print,
    tensor_digest,
)
from ms_quant.files.safetensors_file import SafetensorsFile, StoredRows, TensorInfo, open_file
from ms_quant.files.shards import (
    find_index,
    read_index,
    refuse_second_model,
    unindexed_files,
)

FLOAT_CODES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0"})
MODEL_CODES = ("F32", "F16", "BF16")
IGNORED = "rotary_emb.inv_freq"  # a buffer of old exports


class ChangedSourceError(JobConflictError):
    """A tensor is not what it was when the job was begun.

    Args:
        where: the tensor.
    """

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where} changed since the job was begun (its sha256 differs), expected the same "
            "model in every block; delete the job directory to start again"
        )


class FloatTensors(Protocol):
    """The tensors of a float model: a checkpoint's own, or what is made of them on the way.

    The methods of :class:`Checkpoint`, which has more.
    """

    @property
    def directory(self) -> Path:
        """The model directory."""

    @property
    def names(self) -> list[str]:
        """Every tensor's name, sorted."""

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""

    def read_float32(self, name: str) -> np.ndarray:
        """One tensor, float32, all values finite."""

    def float32_chunks(
        self, name: str, elements: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The same in pieces of bounded size: (first row, float32 rows)."""

    def float_chunks(
        self, name: str, rows: slice | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Rows of a tensor in pieces of bounded size, in the type they are stored in."""

    def place(self, name: str) -> str:
        """Where a tensor is, for errors."""


class Checkpoint:
    """The tensors of a model directory.

    With ``model.safetensors.index.json`` (or exactly one other index of safetensors files) the
    shards are those it names, opened when first needed; otherwise ``model.safetensors``, or else
    every ``*.safetensors`` file, all opened at once. Tensors that an index leaves out are ignored,
    as the index is what other readers follow.

    Args:
        directory (Path | str): the model directory.
        prefix (str): only files, the index among them, whose names begin so are looked at.
        rename (callable, optional): from the name of a tensor in the files to the one by which it
            is asked for. Default: the same.

    Attributes:
        rename, renamed: as given, and whether there is one.
        digests: sha256 of tensors' bytes, where they are known.

    Raises:
        MsQuantError: there is no such directory or no safetensors file in it, the index is
            malformed or names a missing shard, two files hold the same tensor, or there is a whole
            model beside an index that does not name it.
    """

    digests: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        directory: Path | str,
        prefix: str = "",
        rename: Callable[[str], str] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.rename, self.renamed = rename, rename is not None
        self._rename = rename or str
        if not self.directory.is_dir():
            raise BadFileError(f"{self.directory}: no such model directory")
        self._index = find_index(self.directory, prefix)
        self._open: dict[str, SafetensorsFile] = {}
        if self._index is not None:
            self._places = {self._rename(k): v for k, v in read_index(self._index).items()}
            refuse_second_model(self._index, set(self._places.values()))
        else:
            self._places = self._scan(prefix)

    @property
    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return list(self._names)

    @cached_property
    def _names(self) -> list[str]:
        return sorted(self._places)

    def stored(self) -> dict[str, TensorInfo]:
        """What the files hold of the model, by the names of the tensors in them."""
        return {name: self._stored_in(name).info(name) for name in sorted(self._places)}

    def hashed_in(self, file: SafetensorsFile) -> list[str]:
        """Names of the tensors in a file that decide the model's numbers."""
        return [name for name in file.tensors if name in self._places and self._decides(file, name)]

    def _decides(self, file: SafetensorsFile, name: str) -> bool:
        return file.info(name).code in FLOAT_CODES and not name.endswith(IGNORED)

    def check_part(self, name: str) -> None:
        """Refuses what a stored tensor may not hold, beside NaN and infinity."""

    def largest(self, name: str) -> float:
        """A number that no magnitude in a float tensor exceeds, known without reading it."""
        return float(ml_dtypes.finfo(self.info(name).dtype).max)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def files(self) -> list[Path]:
        """The safetensors files, sorted by name."""
        return [self.directory / shard for shard in sorted(set(self._places.values()))]

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor, in the file that :meth:`file_of` gives.

        Raises:
            MsQuantError: there is no such tensor, or its shard is malformed.
        """
        return self.file_of(name).info(name)

    def expect(
        self,
        digests: Mapping[str, str],
        unproven: Iterable[str],
        stamps: Mapping[str, list[int]],
    ) -> None:
        """Says what tensors are. One that is not proven is hashed when it is read first.

        Args:
            digests (Mapping[str, str]): name to the sha256 of the tensor's bytes.
            unproven (Iterable[str]): those that this process has not hashed yet.
            stamps (Mapping[str, list[int]]): file name to what its file looked like. Where it
                looks different later, its tensors are no longer proven.
        """
        self.digests, self._unproven, self._stamps = dict(digests), set(unproven), dict(stamps)

    def _prove(self, name: str) -> None:
        if name not in self.digests:
            return
        file = self._stored_in(name)
        stamp = file_stamp(file.path)
        if self._stamps.get(file.path.name) != stamp:
            self._unproven |= self.digests.keys() & file.tensors.keys()
            self._stamps[file.path.name] = stamp
        if name not in self._unproven:
            return
        if tensor_digest(file, name) != self.digests[name]:
            raise ChangedSourceError(f"{file.path}: tensor {name!r}")
        self._unproven.discard(name)

    def file_of(self, name: str) -> SafetensorsFile:
        """The opened file that holds a tensor, for instance to read some rows of it.

        Raises:
            MsQuantError: there is no such tensor, or its shard is malformed.
        """
        return self._stored_in(name)

    def _stored_in(self, name: str) -> SafetensorsFile:
        """The opened file of a tensor, by the name that it has there."""
        if name not in self._places:
            raise BadFileError(f"{self.directory}: has no tensor {name!r}")
        return self.shard(self._places[name])

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, as an array of its own, in the dtype it is stored in.

        Raises:
            MsQuantError: there is no such tensor, or its shard is malformed.
        """
        self._prove(name)
        return self.file_of(name).read(name)

    def read_float32(self, name: str) -> np.ndarray:
        """Reads one tensor of any float dtype as float32.

        Args:
            name (str): the tensor.

        Returns:
            numpy.ndarray, float32, all values finite.

        Raises:
            MsQuantError: the tensor is missing, is not float, or holds NaN or infinity.
        """
        array = np.empty(self.info(name).shape, np.float32)
        for start, part in self.float32_chunks(name):
            if part.shape == array.shape:
                array = part
            else:
                array[start : start + len(part)] = part
        return array

    def float32_chunks(
        self, name: str, elements: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """As :meth:`float_chunks`, as float32; a float64 too large for it is refused."""
        return self.float_chunks(name, elements=elements, dtype=np.dtype(np.float32))

    def float_chunks(
        self,
        name: str,
        rows: slice | None = None,
        *,
        elements: int | None = None,
        dtype: np.dtype | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Reads one float tensor some rows at a time.

        Args:
            name (str): the tensor.
            rows (slice, optional): which rows to read. Default: all.
            elements (int, optional): at most this many values at a time, but at least one row.
                Default: 4 Mi.
            dtype (numpy.dtype, optional): what to convert to. Default: as it is stored.

        Returns:
            Iterator of (first row, rows), all values finite. Tensors of one shape come in the
            same pieces.

        Raises:
            MsQuantError: the tensor is missing, is not float, or holds NaN or infinity.
        """
        self._prove(name)
        file = self.file_of(name)
        info = file.info(name)
        if info.code not in FLOAT_CODES:
            raise BadFileError(
                f"{file.path}: tensor {name!r} has dtype {info.code}, expected a float dtype"
            )
        seen = wrong = 0
        for start, part in row_chunks(file, name, rows, elements or CHUNK_ELEMENTS):
            if dtype is not None:
                with np.errstate(over="ignore"):  # what becomes infinite is refused below
                    part = part.astype(dtype, copy=False)
            seen, wrong = seen + part.size, wrong + count_non_finite(part)
            if not wrong:
                yield start, part
        if wrong:
            raise BadFileError(
                f"{file.path}: tensor {name!r} holds {wrong} NaN or infinite values of {seen}, "
                "expected none"
            )

    def stored_rows(self, name: str, start: int, stop: int) -> StoredRows | None:
        """Some rows of a matrix, unchecked; None where :class:`StoredRows` holds no such ones."""
        self._prove(name)
        file = self.file_of(name)
        bfloat16 = file.info(name).code == "BF16"
        return StoredRows(file.read_rows(name, start, stop)) if bfloat16 else None

    def place(self, name: str) -> str:
        """The file of a tensor and its name, for errors."""
        return f"{self.file_of(name).path}: tensor {name!r}"

    def shard(self, shard: str) -> SafetensorsFile:
        """The opened shard of a file name, checked against the index."""
        if shard not in self._open:
            file = open_file(self.directory / shard)
            tensors = {self._rename(name): info for name, info in file.tensors.items()}
            file = replace(file, tensors=tensors)
            if self._index is not None:
                self._check_shard(file, shard)
            self._open[shard] = file
        return self._open[shard]

    def _check_shard(self, file: SafetensorsFile, shard: str) -> None:
        for name in self._named_in.get(shard, ()):
            if name not in file.tensors:
                raise BadFileError(
                    f"{file.path}: has no tensor {name!r}, expected it as {self._index} says"
                )
        for name in file.tensors:
            place = self._places.get(name, shard)
            if place != shard:
                raise BadFileError(
                    f"{file.path}: holds tensor {name!r}, expected it only in {place} as "
                    f"{self._index} says"
                )

    @cached_property
    def _named_in(self) -> dict[str, list[str]]:
        """The tensors that the index names, by shard."""
        found: dict[str, list[str]] = {}
        for name, shard in self._places.items():
            found.setdefault(shard, []).append(name)
        return found

    def _scan(self, prefix: str) -> dict[str, str]:
        shard_of: dict[str, str] = {}
        for shard in unindexed_files(self.directory, prefix):
            for name in self.shard(shard).tensors:
                if name in shard_of:
                    raise BadFileError(
                        f"{self.directory / shard}: holds tensor {name!r}, expected it only in "
                        f"{shard_of[name]}"
                    )
                shard_of[name] = shard
        return shard_of


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Tells whether a checkpoint is the one a job began with, without reading all of it.

    It covers ``config.json``, every shard's size and header, and 64 evenly spaced samples of 4 KiB
    of its data. It is not a full hash: a change between the samples that keeps the size is not
    seen. Modification times do not count.

    Args:
        checkpoint (Checkpoint): the tensors.

    Returns:
        dict, that JSON can hold: ``config_sha256`` (None without a ``config.json``), and
        ``shards``, from file name to ``bytes``, ``header_sha256`` and ``samples_sha256``.

    Raises:
        MsQuantError: a shard is malformed or cannot be read.
    """
    config = checkpoint.directory / "config.json"
    return {
        "config_sha256": sha256_file(config) if config.is_file() else None,
        "shards": {
            path.name: shard_print(checkpoint.shard(path.name)) for path in checkpoint.files()
        },
    }


def check_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape, or of no type that a float model has.

    Raises:
        MsQuantError: names the tensor, what was found and what was expected.
    """
    info = checkpoint.info(name)
    if info.shape != shape:
        raise BadFileError(
            f"{checkpoint.place(name)} has shape {list(info.shape)}, expected {list(shape)}"
        )
    if info.code not in MODEL_CODES:
        raise BadFileError(
            f"{checkpoint.place(name)} has dtype {info.code}, expected one of "
            f"{', '.join(MODEL_CODES)}"
        )
