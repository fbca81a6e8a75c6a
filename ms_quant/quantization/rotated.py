"""A float checkpoint as QuaRot rotates it, tensor by tensor, without writing it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ms_quant.algorithms.quarot import QuaRot, TensorRotation
from ms_quant.errors import BadFileError
from ms_quant.files.reader import CHUNK_ELEMENTS, Checkpoint, FloatTensors
from ms_quant.files.safetensors_file import TensorInfo
from ms_quant.models.config import ModelConfig

BLOCK_ELEMENTS = 1 << 16  # 512 KiB of float64: temporaries stay in the cache


class RotatedCheckpoint(FloatTensors):
    """The tensors of the rotated model, each computed in float64 and rounded once to float32.

    It has exactly the tensors of its config: a tied head becomes a tensor of its own, and what a
    float model does not need is left out. The same seed gives the same bits, however a tensor is
    read. ``config.dtype`` stays that of the source, whose precision rotated float32 weights exceed.

    Args:
        checkpoint (Checkpoint): the float model, which was checked against its config.
        config (ModelConfig): of that model.
        seed (int): of the rotation, at least 0.
        block_size (int, optional): channels that are rotated together. Default: 0, all of them.

    Attributes:
        config: the rotated model's; ``config.raw`` is its ``config.json``.

    Raises:
        MsQuantError: there is no Hadamard matrix of its hidden size, head size or blocks.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, seed: int, block_size: int = 0
    ) -> None:
        self._checkpoint = checkpoint
        where = str(checkpoint.directory / "config.json")
        self._quarot = QuaRot(config, seed, where, block_size)
        self.config = self._quarot.config
        self._shapes = self.config.parameter_shapes()

    @property
    def directory(self) -> Path:
        """The model directory that is read."""
        return self._checkpoint.directory

    @property
    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._shapes)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor, placed as in a file of its own.

        Raises:
            MsQuantError: there is no such tensor.
        """
        self._rotation(name)
        dtype, shape = np.dtype(np.float32), self._shapes[name]
        return TensorInfo(dtype, shape, 0, math.prod(shape) * dtype.itemsize)

    def read_float32(self, name: str) -> np.ndarray:
        """Reads and rotates one tensor.

        Raises:
            MsQuantError: there is no such tensor, or it or what it becomes is not finite.
        """
        rotation = self._rotation(name)
        array = self._checkpoint.read_float32(rotation.source)
        self._rotate(name, array, self._gain(name))
        return array

    def float32_chunks(
        self, name: str, elements: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Reads and rotates one tensor some rows at a time, in the pieces of ``Checkpoint``.

        A weight whose rows mix, as those of o_proj and down_proj, is held whole, as float32.

        Args:
            name (str): the tensor.
            elements (int, optional): at most this many values at a time, but at least one row.
                Default: 4 Mi.

        Returns:
            Iterator of (first row, float32 rows), all values finite.

        Raises:
            MsQuantError: there is no such tensor, or it or what it becomes is not finite.
        """
        rotation = self._rotation(name)
        if rotation.rows is not None:
            whole = self.read_float32(name)
            step = max(1, (elements or CHUNK_ELEMENTS) // math.prod(whole.shape[1:]))
            for start in range(0, len(whole), step):
                yield start, whole[start : start + step]
            return
        gain = self._gain(name)
        for start, part in self._checkpoint.float32_chunks(rotation.source, elements):
            self._rotate(name, part, gain)
            yield start, part

    def float_chunks(
        self, name: str, rows: slice | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """As :meth:`float32_chunks`, of the rows that are wanted."""
        for start, part in self.float32_chunks(name):
            if rows is None:
                yield start, part
                continue
            wanted = part[max(0, rows.start - start) : max(0, rows.stop - start)]
            if len(wanted):
                yield max(start, rows.start), wanted

    def place(self, name: str) -> str:
        """The model directory and the name of a tensor, for errors."""
        return f"{self.directory}: tensor {name!r} once rotated"

    def _rotation(self, name: str) -> TensorRotation:
        if name not in self._shapes:
            raise BadFileError(f"{self.directory}: the rotated model has no tensor {name!r}")
        return self._quarot.rotations[name]

    def _gain(self, name: str) -> np.ndarray | None:
        return self._quarot.gain(name, self._checkpoint.read_float32)

    def _rotate(self, name: str, array: np.ndarray, gain: np.ndarray | None) -> None:
        """Rotates float32 rows where they are, a block at a time."""
        for block in _blocks(array, self._quarot.rotations[name]):
            rotated = self._quarot.rotate(name, array[block], gain)
            with np.errstate(over="ignore"):  # what becomes infinite is refused below
                array[block] = rotated
            if not np.isfinite(array[block]).all():
                raise BadFileError(
                    f"{self.place(name)} holds {np.abs(rotated).max():g}, expected values that "
                    "fit float32"
                )


def _blocks(array: np.ndarray, rotation: TensorRotation) -> Iterator[tuple[slice, ...]]:
    """Index blocks whose rotations do not depend on each other: rows, columns, or whole sets of
    them."""
    if array.ndim == 1:
        yield (slice(None),)
        return
    units = [1 if turn is None else turn.unit for turn in (rotation.rows, rotation.columns)]
    axis = 0 if rotation.rows is None or (rotation.columns and units[0] <= units[1]) else 1
    unit = units[axis]
    step = max(1, BLOCK_ELEMENTS // (array.shape[1 - axis] * unit)) * unit
    for start in range(0, array.shape[axis], step):
        yield (slice(None),) * axis + (slice(start, start + step),)
