"""What a W8A8SC checkpoint holds: sizes and sparsity of every layer, and what was lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ms_quant.models.names import block_prefix
from ms_quant.report.page import check_page
from ms_quant.report.records import Further
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
from sparse_compress.ranks.reader import SparseModel, open_w8a8sc
from sparse_compress.ranks.summary import open_sparse, sparse_linears, summary


def info(directory: Path, plot: Path | None = None, workers: int = CORES) -> dict[str, Any]:
    """A row for each compressed linear of each rank. Every tile is decoded, one linear at a time.

    Args:
        directory: the checkpoint.
        plot: an HTML page to make about it.
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
        check_page(plot, directory)
    result, histograms, groups = _measured(directory, workers)
    if plot is not None:
        report.write_info_page(plot, directory, result, histograms, groups)
        result["plot"] = str(plot)
    return result


def further(directory: Path) -> Further | None:
    """What ``ms-quant report`` says of a W8A8SC checkpoint of ranks; None of any other.

    Raises:
        MsQuantError: a tile cannot be decoded.
    """
    if is_msmodelslim(directory) or not isinstance(open_w8a8sc(directory), SparseModel):
        return None
    result, histograms, groups = _measured(directory, CORES)
    assert groups is not None
    return report.further(result, histograms, groups)


def _measured(
    directory: Path, workers: int
) -> tuple[dict[str, Any], list[NDArray[np.int64]], dict[str, str] | None]:
    """The result of :func:`info`, the counts of each row's bytes, and path of a compressed linear
    to that of its group, of a checkpoint of ranks."""
    groups = None
    if is_msmodelslim(directory):
        model = ModelSlimDirectory(directory)
        described = compressed_summary(model) if model.coded else plain_summary(model)
        result, coded = described.as_json(), msmodelslim_linears(model, workers)
    else:
        sparse = open_sparse(directory, workers)
        result, coded = summary(directory).as_json(), sparse_linears(sparse)
        groups = {
            fused: f"{block_prefix(index)}{group.name}"
            for index, group, fused in sparse.layout.linears()
        }
    rows, histograms = [], []
    for sizes, decode in coded:
        weight = decode()
        counts = count_bytes(weight.reshape(-1).view(np.uint8))
        zeros = weight.size - int(np.count_nonzero(weight))
        measures = {"sparsity": zeros / weight.size, "entropy_bytes": report.entropy_bytes(counts)}
        rows.append({**sizes, **measures})
        histograms.append(counts)
    return {**result, "rows": rows}, histograms, groups
