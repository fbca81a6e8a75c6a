"""A checkpoint directory: one safetensors file or several with an index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from ms_quant.errors import BadFileError, JobConflictError
from ms_quant.files.atomic import sha256_file
from ms_quant.files.digest import (
    CHUNK_ELEMENTS,
    count_non_finite,
    file_stamp,
    row_chunks,
    tensor_digest,
)
from ms_quant.files.safetensors_file import (
    SafetensorsFile,
    TensorInfo,
    open_file,
)
from ms_quant.files.strict_json import read_json
from ms_quant.files.writer import INDEX_NAME

SINGLE_NAME = "model.safetensors"
SHARDS = "model-*-of-*.safetensors"
MAX_INDEX_BYTES = 256 << 20
FLOAT_CODES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0"})
MODEL_CODES = ("F32", "F16", "BF16")
SAMPLES = 64
SAMPLE_BYTES = 4096
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
        renamed: whether there is a ``rename``.
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
        self.renamed = rename is not None
        self._rename = rename or str
        if not self.directory.is_dir():
            raise BadFileError(f"{self.directory}: no such model directory")
        self._index = _find_index(self.directory, prefix)
        self._open: dict[str, SafetensorsFile] = {}
        if self._index is not None:
            self._places = {self._rename(k): v for k, v in _read_index(self._index).items()}
            _refuse_second_model(self._index, set(self._places.values()))
        else:
            self._places = self._scan(prefix)

    @property
    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._places)

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
        file = self.file_of(name)
        stamp = file_stamp(file.path)
        if self._stamps.get(file.path.name) != stamp:
            self._unproven |= self.digests.keys() & file.tensors.keys()
            self._stamps[file.path.name] = stamp
        if name not in self._unproven:
            return
        if tensor_digest(file, name) != self.digests[name]:
            raise ChangedSourceError(self.place(name))
        self._unproven.discard(name)

    def file_of(self, name: str) -> SafetensorsFile:
        """The opened file that holds a tensor, for instance to read some rows of it.

        Raises:
            MsQuantError: there is no such tensor, or its shard is malformed.
        """
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
        for name, place in self._places.items():
            if place == shard and name not in file.tensors:
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

    def _scan(self, prefix: str) -> dict[str, str]:
        shard_of: dict[str, str] = {}
        for shard in _unindexed_files(self.directory, prefix):
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


def _find_index(directory: Path, prefix: str) -> Path | None:
    if INDEX_NAME.startswith(prefix) and (directory / INDEX_NAME).is_file():
        return directory / INDEX_NAME
    found = sorted(
        path
        for path in directory.glob(f"{prefix}*.index.json")
        if not path.name.endswith(".bin.index.json")
    )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise BadFileError(f"{directory}: has the indexes {names}, expected one")
    return found[0] if found else None


def _refuse_second_model(index: Path, shards: set[str]) -> None:
    """Refuses a whole model beside an index of another: transformers would read the former."""
    single = index.with_name(SINGLE_NAME)
    if index.name == INDEX_NAME and single.is_file() and SINGLE_NAME not in shards:
        raise BadFileError(
            f"{single}: stands beside {index.name}, which does not name it, expected one of the "
            "two models: delete the file, or the index and its shards; runtimes differ in which "
            "they read"
        )


def _unindexed_files(directory: Path, prefix: str) -> list[str]:
    if SINGLE_NAME.startswith(prefix) and (directory / SINGLE_NAME).is_file():
        shards = sorted(path.name for path in directory.glob(SHARDS))
        if shards:
            raise BadFileError(
                f"{directory}: has {SINGLE_NAME} and shards such as {shards[0]} with no index, "
                "expected one of the two: runtimes differ in which they read"
            )
        return [SINGLE_NAME]
    found = directory.glob(f"{prefix}*.safetensors")
    names = sorted(path.name for path in found if not path.name.startswith((".", "adapter_")))
    # Mistral's own files say the same again under other names.
    names = [name for name in names if not name.startswith("consolidated")] or names
    if not names:
        raise BadFileError(
            f"{directory}: found no {prefix and prefix + '*'}.safetensors file, expected at least "
            "one (.bin, .pt and other pickle files are not read)"
        )
    return names


def _read_index(path: Path) -> dict[str, str]:
    shard_of = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise BadFileError(f"{path}: weight_map is {shard_of!r:.80}, expected file names by tensor")
    for name, shard in shard_of.items():
        _check_shard_name(shard, f"{path}: the shard of {name!r}")
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise BadFileError(
            f"{path.parent / missing[0]}: no such file, expected as {path} names it; "
            f"{len(missing)} of its {len(shards)} files are missing: get the rest of the model "
            "(hf download goes on where it stopped)"
        )
    return shard_of


def _check_shard_name(shard: Any, where: str) -> None:
    """The name stays in the directory. A symlink may lead out: Hugging Face caches are such."""
    if not isinstance(shard, str) or any(char in shard for char in "/\\:\0"):
        raise BadFileError(f"{where} is {shard!r:.80}, expected a file name without a path")
    if not shard.endswith(".safetensors"):
        raise BadFileError(
            f"{where} is {shard!r:.80}, expected a .safetensors file (pickle files are not read)"
        )


def check_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape, or of no type that a float model has.

    Raises:
        MsQuantError: names the tensor, what was found and what was expected.
    """
    file = checkpoint.file_of(name)
    info = file.info(name)
    if info.shape != shape:
        raise BadFileError(
            f"{file.path}: tensor {name!r} has shape {list(info.shape)}, expected {list(shape)}"
        )
    if info.code not in MODEL_CODES:
        raise BadFileError(
            f"{file.path}: tensor {name!r} has dtype {info.code}, expected one of "
            f"{', '.join(MODEL_CODES)}"
        )


def shard_print(file: SafetensorsFile) -> dict[str, Any]:
    """What :func:`fingerprint` knows of one file."""
    samples = hashlib.sha256()
    room = file.size - file.data_start - SAMPLE_BYTES
    for step in range(SAMPLES if room > 0 else 1):
        start = file.data_start + max(room, 0) * step // (SAMPLES - 1)
        samples.update(file.read_bytes(start, min(start + SAMPLE_BYTES, file.size)))
    return {
        "bytes": file.size,
        "header_sha256": hashlib.sha256(file.read_bytes(0, file.data_start)).hexdigest(),
        "samples_sha256": samples.hexdigest(),
    }
