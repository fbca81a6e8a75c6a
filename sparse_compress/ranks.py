"""Rank directories: their tensors, and whether they are those that the layout asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ms_quant.checkpoint.safetensors_file import SafetensorsFile, TensorInfo, open_file
from ms_quant.errors import MsQuantError
from sparse_compress.layouts import Layout, rank_name


class RankTensors:
    """The tensors of one rank directory, from every safetensors file in it.

    Args:
        directory: such as ``OUTPUT/rank_0``.

    Raises:
        MsQuantError: there is no such directory or no file in it, or two files hold one tensor.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        if not directory.is_dir():
            raise MsQuantError(f"{directory}: no such rank directory, expected as described")
        self._files: dict[str, SafetensorsFile] = {}
        for path in sorted(directory.glob("*.safetensors")):
            file = open_file(path)
            for name in file.tensors:
                if name in self._files:
                    raise MsQuantError(
                        f"{path}: holds tensor {name!r}, expected it only in "
                        f"{self._files[name].path}"
                    )
                self._files[name] = file
        if not self._files:
            raise MsQuantError(f"{directory}: holds no tensors, expected those of a rank")

    @property
    def names(self) -> set[str]:
        return set(self._files)

    @property
    def bytes(self) -> int:
        """The size of all tensors."""
        places = (self.info(name) for name in self._files)
        return sum(place.stop - place.start for place in places)

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
            raise MsQuantError(f"{self.directory}: has no tensor {name!r}")
        return self._files[name]


def structure_problems(layout: Layout, ranks: list[RankTensors]) -> list[str]:
    """Missing and unknown tensors, and those of a wrong type or shape, one line each."""
    problems, expected = [], layout.tensors()
    for rank in ranks:
        for name, spec in expected.items():
            if name not in rank.names:
                shape = "one dimension" if spec.shape is None else list(spec.shape)
                problems.append(
                    f"{rank.directory}: tensor {name!r} is missing, expected {spec.dtype} {shape}"
                )
                continue
            info = rank.info(name)
            wrong = spec.problem(info.dtype, info.shape)
            if wrong:
                problems.append(f"{rank.path(name)}: tensor {name!r}: {wrong}")
        problems += [
            f"{rank.path(name)}: unknown tensor {name!r}, expected none"
            for name in sorted(rank.names - set(expected))
        ]
    return problems


def open_ranks(directory: Path, tp: int) -> list[RankTensors]:
    """Exactly the rank directories of a checkpoint.

    The runtime falls back to rank_0 without a word where one is missing; here that is an error.

    Raises:
        MsQuantError: a rank directory is missing, one too many, or malformed.
    """
    found = sorted(path.name for path in directory.glob("rank_*"))
    expected = sorted(map(rank_name, range(tp)))
    if found != expected:
        raise MsQuantError(f"{directory}: has {found!r:.80}, expected {expected!r:.80}")
    return [RankTensors(directory / rank_name(rank)) for rank in range(tp)]
