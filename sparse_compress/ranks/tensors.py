"""The ranks of a checkpoint: their tensors, and whether they are those that the layout asks for."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.files.safetensors_file import SafetensorsFile, TensorInfo, open_file
from ms_quant.files.strict_json import read_json
from ms_quant.models.block_spec import LinearGroup
from sparse_compress.codec import decompress_matrix, matrix_info
from sparse_compress.layouts import MAX_DESCRIPTION_BYTES, Layout, Target
from sparse_compress.layouts.fp16 import SMALLEST_NORMAL
from sparse_compress.layouts.partition import fused_shape


class RankTensors:
    """The tensors of one rank.

    Args:
        place: its file, or a directory such as ``OUTPUT/rank_0``, of which every safetensors file
            is read.

    Raises:
        MsQuantError: there is no such place or no tensor in it, or two files hold one tensor.
    """

    def __init__(self, place: Path):
        self.place = place
        self._files: dict[str, SafetensorsFile] = {}
        for path in sorted(place.glob("*.safetensors")) if place.is_dir() else [place]:
            file = open_file(path)
            for name in file.tensors:
                if name in self._files:
                    raise BadFileError(
                        f"{path}: holds tensor {name!r}, expected it only in "
                        f"{self._files[name].path}"
                    )
                self._files[name] = file
        if not self._files:
            raise BadFileError(f"{place}: holds no tensors, expected those of a rank")

    @property
    def names(self) -> set[str]:
        return set(self._files)

    @property
    def files(self) -> list[SafetensorsFile]:
        """The files that it is in, sorted by path."""
        return sorted({f.path: f for f in self._files.values()}.values(), key=lambda f: f.path)

    @property
    def bytes(self) -> int:
        """The size of all tensors."""
        spans = (self.info(name) for name in self._files)
        return sum(span.stop - span.start for span in spans)

    def info(self, name: str) -> TensorInfo:
        return self._file(name).info(name)

    def path(self, name: str) -> Path:
        """The file of a tensor."""
        return self._file(name).path

    def read(self, name: str) -> np.ndarray:
        return self._file(name).read(name)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` (exclusive) of a tensor."""
        return self._file(name).read_rows(name, start, stop)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            raise BadFileError(f"{self.place}: has no tensor {name!r}")
        return self._files[name]


def structure_problems(
    layout: Layout, ranks: list[RankTensors], ignored: Collection[str] = ()
) -> list[str]:
    """Missing and unknown tensors, and those of a wrong type or shape, one line each.

    Args:
        layout: what each rank should hold.
        ranks: the ranks.
        ignored: suffixes of what a rank may hold beside it.
    """
    problems, expected = [], layout.tensors()
    for rank in ranks:
        for name, spec in expected.items():
            if name not in rank.names:
                shape = "one dimension" if spec.shape is None else list(spec.shape)
                problems.append(
                    f"{rank.place}: tensor {name!r} is missing, expected {spec.dtype} {shape}"
                )
                continue
            info = rank.info(name)
            wrong = spec.problem(info.dtype, info.shape)
            if wrong:
                problems.append(f"{rank.path(name)}: tensor {name!r}: {wrong}")
        problems += [
            f"{rank.path(name)}: unknown tensor {name!r}, expected none"
            for name in sorted(rank.names - set(expected))
            if name.rpartition(".")[2] not in ignored
        ]
    return problems


def description_problems(
    directory: Path, layout: Layout, ranks: list[RankTensors]
) -> Iterator[str]:
    """Where the description is not the one that follows from the layout, one line each."""
    path = directory / layout.target.description
    expected = layout.target.describe(layout, lambda rank, name: ranks[rank].info(name).shape[0])
    found = read_json(path, MAX_DESCRIPTION_BYTES)
    for key in sorted({*expected, *found}):
        ours, theirs = expected.get(key), found.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            for name in sorted({*ours, *theirs}):
                if ours.get(name) != theirs.get(name):
                    yield (
                        f"{path}: {key}: {name} is {theirs.get(name)!r:.80}, expected "
                        f"{ours.get(name)!r}"
                    )
        elif ours != theirs:
            yield f"{path}: {key} is {theirs!r:.80}, expected {ours!r:.80}"


def open_ranks(directory: Path, target: Target, tp: int) -> list[RankTensors]:
    """Exactly the ranks of a checkpoint.

    A runtime may fall back to rank 0 without a word where one is missing; here that is an error.

    Raises:
        MsQuantError: a rank is missing, one too many, or malformed.
    """
    return [RankTensors(path) for path in rank_paths(directory, target, tp)]


def rank_paths(directory: Path, target: Target, tp: int) -> list[Path]:
    """Where the ranks of a checkpoint are: these and no others.

    Raises:
        MsQuantError: a rank is missing, or one too many.
    """
    found = sorted(path.name for path in directory.glob(target.ranks))
    paths = [target.rank_path(rank) for rank in range(tp)]
    if found != sorted(paths):
        raise BadFileError(f"{directory}: has {found!r:.80}, expected {sorted(paths)!r:.80}")
    return [directory / path for path in paths]


def decode_weight(
    layout: Layout, tensors: RankTensors, fused: str, group: LinearGroup, workers: int
) -> np.ndarray:
    """The int8 weight of a compressed linear on one rank.

    Raises:
        MsQuantError: its index, its ``info`` or a tile is wrong.
    """
    info = matrix_info(*fused_shape(group, layout.tp))
    if layout.target.info:
        _check_info(tensors, f"{fused}.info", info)
    weight, tiles = tensors.read(f"{fused}.weight"), tensors.read(f"{fused}.index")
    try:
        return decompress_matrix(weight, tiles, info, "low", threads=workers)
    except MsQuantError as error:
        path = tensors.path(f"{fused}.weight")
        raise BadFileError(f"{path}: tensor '{fused}.weight': {error}") from None


def check_input_scale(scale: np.ndarray, name: str) -> None:
    """Refuses scales that are not normal float16.

    Raises:
        MsQuantError: says how many are not.
    """
    good = int(np.count_nonzero(np.isfinite(scale) & (scale >= SMALLEST_NORMAL)))
    if good != scale.size:
        raise BadFileError(
            f"{name}: {scale.size - good} of {scale.size} values are not finite or below "
            f"{SMALLEST_NORMAL:g}, the smallest normal float16"
        )


def _check_info(tensors: RankTensors, name: str, expected: np.ndarray) -> None:
    found = tensors.read(name)
    if not np.array_equal(found, expected):
        raise BadFileError(
            f"{tensors.path(name)}: tensor {name!r} is {found.tolist()}, expected "
            f"{expected.tolist()}"
        )
