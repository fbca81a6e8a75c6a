"""Finding and replacing Cells in a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from mindspore import Parameter, mint, nn

from ms_quant.numerics.storage import DTYPES


def is_linear(cell: nn.Cell) -> bool:
    """mint.nn.Linear is not a subclass of nn.Dense."""
    return isinstance(cell, nn.Dense | mint.nn.Linear)


def linears(network: nn.Cell) -> Iterator[tuple[str, nn.Cell]]:
    """(path, Cell) of every linear inside a network, in definition order."""
    return ((path, cell) for path, cell in network.cells_and_names() if path and is_linear(cell))


def get_cell(network: nn.Cell, path: str) -> nn.Cell:
    """The Cell at a dotted path."""
    for name in path.split("."):
        network = network._cells[name]
    return network


def _put(network: nn.Cell, path: str, cell: nn.Cell) -> None:
    """Puts a Cell at a path and wherever else the network holds the Cell that was there.

    The entries of ``_cells`` are set one by one, as an assignment would rename parameters: those
    of a Cell that is only wrapped for a while, and with them a table that another Cell shares.
    """
    old = get_cell(network, path)
    parents = [parent for _, parent in network.cells_and_names()]
    places = [(p, name) for p in parents for name, child in p._cells.items() if child is old]
    for parent, name in places:
        parent._cells[name] = cell
        if isinstance(parent, nn.SequentialCell):
            parent.cell_list = list(parent._cells.values())


def replace_cell(network: nn.Cell, path: str, cell: nn.Cell) -> None:
    """Puts a new Cell in the place of another, everywhere; its parameters are named by the path."""
    _put(network, path, cell)
    for name, parameter in cell.parameters_and_names():
        parameter.name = f"{path}.{name}"


@contextmanager
def replaced(network: nn.Cell, cells: Mapping[str, nn.Cell]) -> Iterator[None]:
    """Puts Cells at their paths, and the old ones back at the end; no parameter is renamed."""
    old = {path: get_cell(network, path) for path in cells}
    for path, cell in cells.items():
        _put(network, path, cell)
    try:
        yield
    finally:
        for path, cell in old.items():
            _put(network, path, cell)


def float_dtype(parameter: Parameter) -> np.dtype:
    """The type of a float parameter, as NumPy has it; float32 for others."""
    return DTYPES.get(str(parameter.dtype).lower(), DTYPES["float32"])


def host_array(parameter: Parameter) -> np.ndarray:
    """The values of a parameter.

    bfloat16 comes from MindSpore with a type object of its own, which no other library knows.
    """
    array = parameter.asnumpy()
    return (
        array.view(np.uint16).view(DTYPES["bfloat16"]) if "bfloat16" in str(array.dtype) else array
    )
