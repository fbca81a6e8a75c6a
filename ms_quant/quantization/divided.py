"""A float model with some linears' rows divided by powers of two, and their readers' columns
multiplied, tensor by tensor, without writing it: the same function, with smaller activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.files.reader import FloatTensors
from ms_quant.files.safetensors_file import TensorInfo
from ms_quant.models.block_spec import BlockSpec
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import in_block
from ms_quant.statistics.activation_range import Divided, read_divided


def as_divided(
    tensors: FloatTensors, config: ModelConfig, entries: Any, where: str
) -> FloatTensors:
    """The model as the entries of a job or a record say that it was divided.

    Args:
        tensors: the float model.
        config: its shape.
        entries, where: see :func:`~ms_quant.statistics.activation_range.read_divided`.

    Raises:
        MsQuantError: an entry is no division.
    """
    divided = read_divided(entries, config, where)
    return DividedTensors(tensors, config, divided) if any(divided) else tensors


class DividedTensors(FloatTensors):
    """The tensors of the divided model. Products with powers of two are exact.

    Args:
        tensors: the float model.
        config: its shape.
        divided: the divisions of each block.
    """

    def __init__(self, tensors: FloatTensors, config: ModelConfig, divided: Sequence[Divided]):
        self._tensors, self._config, self._divided = tensors, config, divided

    @property
    def directory(self) -> Path:
        return self._tensors.directory

    @property
    def names(self) -> list[str]:
        return self._tensors.names

    def __contains__(self, name: str) -> bool:
        return name in self._tensors.names

    def info(self, name: str) -> TensorInfo:
        return self._tensors.info(name)

    def place(self, name: str) -> str:
        return self._tensors.place(name)

    def read_float32(self, name: str) -> np.ndarray:
        array = self._tensors.read_float32(name)
        rows, cols = self._factors(name)
        return _scaled(array, rows, cols) if rows is not None or cols is not None else array

    def float32_chunks(
        self, name: str, elements: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        return self._scaled_chunks(name, self._tensors.float32_chunks(name, elements))

    def float_chunks(
        self, name: str, rows: slice | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        return self._scaled_chunks(name, self._tensors.float_chunks(name, rows))

    def _scaled_chunks(
        self, name: str, chunks: Iterator[tuple[int, np.ndarray]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        rows, cols = self._factors(name)
        for start, part in chunks:
            if rows is None and cols is None:
                yield start, part
                continue
            here = None if rows is None else rows[start : start + len(part)]
            yield start, _scaled(part.astype(np.float32, copy=False), here, cols)

    def _factors(self, name: str) -> tuple[np.ndarray | None, np.ndarray | None]:
        """What the rows and the columns of a tensor are multiplied by."""
        found = in_block(name)
        if found is None:
            return None, None
        return factors(self._config.block(found[0]), self._divided[found[0]], found[1])


def factors(
    block: BlockSpec, divided: Divided, name: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What the rows and the columns of a block's tensor are multiplied by, float32; None for 1."""
    path, _, suffix = name.rpartition(".")
    rows = columns = None
    if path in divided:
        rows = np.ldexp(np.float32(1), -divided[path])
    edge = block.edge_of(path)
    if edge is not None and edge.producer in divided and suffix == "weight":
        columns = np.ldexp(np.float32(1), edge.columns(divided[edge.producer]))
    return rows, columns


def _scaled(array: np.ndarray, rows: np.ndarray | None, cols: np.ndarray | None) -> np.ndarray:
    if rows is not None:
        array = array * (rows[:, None] if array.ndim == 2 else rows)
    return array if cols is None else array * cols
