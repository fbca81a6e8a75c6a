"""What a W8A8SC checkpoint holds: sizes and sparsity of every layer, and what was lost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_compress.codec import CORES
from sparse_compress.codec.format import count_bytes
from sparse_compress.msmodelslim.directory import ModelSlimDirectory
from sparse_compress.msmodelslim.files import is_msmodelslim
from sparse_compress.msmodelslim.summary import (
    compressed_summary,
    msmodelslim_linears,
    plain_summary,
)
from sparse_compress.pipeline import report
from sparse_compress.ranks.summary import open_sparse, sparse_linears, summary


def info(directory: Path, plot: Path | None = None, workers: int = CORES) -> dict[str, Any]:
    """A row for each compressed linear of each rank. Every tile is decoded, one linear at a time.

    Args:
        directory: the checkpoint.
        plot: an HTML page to make about it; needs the extra ``report``.
        workers: how many threads decode a linear.

    Returns:
        JSON: that of a :class:`~sparse_compress.ranks.summary.RankSummary`, or of a
        :mod:`directory of msModelSlim <sparse_compress.msmodelslim.summary>`, with ``plot``
        where there is one, and ``rows`` of ``layer``, ``rank``, ``shape`` ``[n, k]``,
        ``sparsity`` (share of zeros), ``raw_bytes``, ``stored_bytes`` (tiles and index),
        ``ratio``, ``entropy_bytes``
        (order-0 bound of the bytes), ``tiles`` and ``bypass_tiles`` (stored raw).

    Raises:
        MsQuantError: the directory is no W8A8SC checkpoint, a tile cannot be decoded, or the page
            cannot be made.
    """
    directory = Path(directory)
    if plot is not None:
        report.check_page(plot, directory)
    if is_msmodelslim(directory):
        model = ModelSlimDirectory(directory)
        described = compressed_summary(model) if model.coded else plain_summary(model)
        result, coded = described.as_json(), msmodelslim_linears(model, workers)
    else:
        result, coded = (
            summary(directory).as_json(),
            sparse_linears(open_sparse(directory, workers)),
        )
    rows, histograms = [], []
    for sizes, decode in coded:
        weight = decode()
        counts = count_bytes(weight.reshape(-1).view(np.uint8))
        zeros = weight.size - int(np.count_nonzero(weight))
        measures = {"sparsity": zeros / weight.size, "entropy_bytes": entropy_bytes(counts)}
        rows.append({**sizes, **measures})
        histograms.append(counts)
    result["rows"] = rows
    if plot is not None:
        report.write_page(plot, result, histograms)
        result["plot"] = str(plot)
    return result


def entropy_bytes(counts: NDArray[np.int64]) -> int:
    """The bytes that no code goes below that only knows these counts (order-0 entropy)."""
    share = counts[counts > 0] / counts.sum()
    return math.ceil(-float(counts[counts > 0] @ np.log2(share)) / 8)
