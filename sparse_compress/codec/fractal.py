"""Weights as fractals in tile order, the layout that the UNZIP codec reads.

A fractal is 16 rows by 32 columns of int8, row by row. A tile is up to 8 by 8 fractals.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ms_quant.errors import BadFileError

ROWS = 16
COLUMNS = 32
FRACTAL = ROWS * COLUMNS
TILE = 8
TILE_ROWS = TILE * ROWS
TILE_COLUMNS = TILE * COLUMNS


def unsupported_reason(n: int, k: int) -> str | None:
    """Tell why the runtimes cannot serve a compressed linear of this shape.

    Args:
        n: output channels, after tensor-parallel slicing.
        k: input channels, after tensor-parallel slicing.

    Returns:
        One sentence, or None when the shape is inside the runtimes' limits.
    """
    if k <= TILE_COLUMNS:
        return f"k = {k} input channels; a compressed linear needs more than {TILE_COLUMNS}"
    if k % 64:
        return f"k = {k} input channels; a compressed linear needs a multiple of 64"
    if n < TILE_ROWS:
        return f"n = {n} output channels; a compressed linear needs at least {TILE_ROWS}"
    if n % 64:
        return f"n = {n} output channels; a compressed linear needs a multiple of 64"
    return None


def most_bytes(n: int, k: int) -> int:
    """The longest compressed (n, k) weight that the runtimes accept."""
    return -(-n // ROWS) * ROWS * (-(-k // COLUMNS) * COLUMNS)


def tile_count(n: int, k: int) -> int:
    """The number of tiles of an (n, k) int8 matrix.

    Args:
        n: rows, at least 1.
        k: columns, at least 1.

    Returns:
        The number of index records that the matrix takes.

    Raises:
        MsQuantError: when the matrix is empty, or `n` < 128 needs several tiles in k.
    """
    n, k = int(n), int(k)  # NumPy's integers overflow on the absurd shapes that a file may hold
    if n < 1 or k < 1:
        raise BadFileError(f"the weight is ({n}, {k}); expected at least one row and column")
    across = -(-k // TILE_COLUMNS)
    if n < TILE_ROWS and across > 1:
        raise BadFileError(
            f"the weight is ({n}, {k}); fewer than {TILE_ROWS} rows need k <= {TILE_COLUMNS}"
        )
    return across * -(-n // TILE_ROWS)


def tile_sizes(n: int, k: int) -> NDArray[np.int64]:
    """The raw bytes of every tile of an (n, k) int8 matrix, in tile order.

    Args:
        n: rows, at least 1.
        k: columns, at least 1.

    Returns:
        int64 array, one entry for every tile.

    Raises:
        MsQuantError: when the matrix is empty, or `n` < 128 needs several tiles in k.
    """
    count = tile_count(n, k)
    wide, deep = _fractals(n, k)
    across = -(-deep // TILE)
    depths = np.full(across, TILE, np.int64)
    depths[-1] = deep - TILE * (across - 1)
    return np.tile(depths * min(wide, TILE) * FRACTAL, count // across)


def _fractals(n: int, k: int) -> tuple[int, int]:
    """Fractals down and across; from 128 rows on, the rows fill whole tiles."""
    wide = -(-n // ROWS)
    if n >= TILE_ROWS:
        wide = -(-wide // TILE) * TILE
    return wide, -(-k // COLUMNS)


def _row_places(n: int) -> tuple[int, int]:
    """(first, gap): rows from `first` on are moved down by `gap` rows of zeros.

    The runtimes read a last tile of fewer than 8 fractals from its end.
    """
    if n < TILE_ROWS:
        return n, 0
    valid = -(-n // ROWS) % TILE
    return n // TILE_ROWS * TILE_ROWS, (TILE - valid) * ROWS if valid else 0


def to_fractal(weight: NDArray[np.int8]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Lay a weight out as tiles of fractals.

    Rows are padded with zeros to a multiple of 16 and columns to a multiple of 32. Tiles go
    along k first, then along n; so do the fractals of a tile, the other way round. The last tile
    along k is as narrow as the matrix leaves it. The last tile along n has its zeros in front.

    Args:
        weight: int8 (n, k), that is (output channels, input channels).

    Returns:
        The uint8 stream of tiles and the bytes of each tile.

    Raises:
        MsQuantError: when `weight` is not an int8 matrix, is empty, or has fewer than 128 rows
            and more than 256 columns.
    """
    if weight.ndim != 2 or weight.dtype != np.int8:
        raise BadFileError(
            f"the weight is {weight.dtype} of shape {weight.shape}; expected an int8 matrix"
        )
    n, k = weight.shape
    sizes = tile_sizes(n, k)
    wide, deep = _fractals(n, k)
    first, gap = _row_places(n)
    padded = np.zeros((wide * ROWS, deep * COLUMNS), np.uint8)
    padded[:first, :k] = weight[:first].view(np.uint8)
    padded[first + gap : n + gap, :k] = weight[first:].view(np.uint8)
    stream = np.empty(padded.size, np.uint8)
    for tile, view in _tiles(stream, sizes, padded):
        tile[:] = view
    return stream, sizes


def _tiles(
    stream: NDArray[np.uint8], sizes: NDArray[np.int64], padded: NDArray[np.uint8]
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """The tiles as views of the stream and of the matrix: (k-fractal, n-fractal, 16, 32)."""
    across = -(-padded.shape[1] // TILE_COLUMNS)
    starts = np.cumsum(sizes) - sizes
    for number, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        top, left = number // across * TILE_ROWS, number % across * TILE_COLUMNS
        tile = padded[top : top + TILE_ROWS, left : left + TILE_COLUMNS]
        wide, deep = tile.shape[0] // ROWS, tile.shape[1] // COLUMNS
        yield (
            stream[start : start + size].reshape(deep, wide, ROWS, COLUMNS),
            tile.reshape(wide, ROWS, deep, COLUMNS).transpose(2, 0, 1, 3),
        )


def from_fractal(stream: NDArray[np.uint8], n: int, k: int) -> NDArray[np.int8]:
    """Undo `to_fractal`. What the padding holds is not looked at.

    Args:
        stream: uint8 stream of tiles.
        n: rows of the weight.
        k: columns of the weight.

    Returns:
        The int8 (n, k) weight.

    Raises:
        MsQuantError: when the shape cannot be laid out or `stream` has another size.
    """
    sizes = tile_sizes(n, k)
    if stream.dtype != np.uint8 or stream.shape != (int(sizes.sum()),):
        raise BadFileError(
            f"the stream is {stream.dtype} of shape {stream.shape}; a ({n}, {k}) weight takes "
            f"{sizes.sum()} bytes of uint8"
        )
    wide, deep = _fractals(n, k)
    first, gap = _row_places(n)
    padded = np.empty((wide * ROWS, deep * COLUMNS), np.uint8)
    for tile, view in _tiles(stream, sizes, padded):
        view[:] = tile
    rows = np.concatenate([padded[:first, :k], padded[first + gap : n + gap, :k]])
    return rows.view(np.int8)
