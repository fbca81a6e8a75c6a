"""What a W8A8SC checkpoint holds: sizes and sparsity of every layer, and what was lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ms_quant.errors import MsQuantError
from ms_quant.files.strict_json import read_json
from ms_quant.job.output_directory import MAX_RECORD_BYTES, RECORD
from ms_quant.statistics.activation_range import float16_facts
from sparse_compress.codec import CORES, backend_note
from sparse_compress.codec.format import count_bytes
from sparse_compress.layouts import Layout
from sparse_compress.layouts.msmodelslim import TARGET
from sparse_compress.layouts.partition import fused_shape
from sparse_compress.msmodelslim.directory import SlimDirectory
from sparse_compress.msmodelslim.files import is_slim
from sparse_compress.msmodelslim.rewrite import COMMAND
from sparse_compress.pipeline import report
from sparse_compress.ranks.reader import SparseModel, open_w8a8sc
from sparse_compress.verify.proof import Proof

COUNTS = ("size", "pruned", "source_zeros", "rounded", "zeros", "input_scale_raised")
CODED_BIT = 1 << 15
Coded = tuple[dict[str, Any], Callable[[], np.ndarray]]
"""The sizes of a compressed linear, and what decodes it."""


def open_sparse(directory: Path, workers: int = CORES) -> SparseModel:
    """Opens a W8A8SC checkpoint.

    Raises:
        MsQuantError: the directory is none, or its structure is wrong.
    """
    model = open_w8a8sc(directory, workers)
    if not isinstance(model, SparseModel):
        raise MsQuantError(f"{directory}: is no W8A8SC checkpoint")
    return model


def info(directory: Path, plot: Path | None = None, workers: int = CORES) -> dict[str, Any]:
    """A row for each compressed linear of each rank. Every tile is decoded, one linear at a time.

    Args:
        directory: the checkpoint.
        plot: an HTML page to make about it; needs the extra ``report``.
        workers: how many threads decode a linear.

    Returns:
        JSON: what :func:`summary` or :func:`slim_summary` returns, with ``plot`` where there is
        one, and ``rows`` of ``layer``, ``rank``, ``shape`` ``[n, k]``, ``sparsity`` (share of
        zeros), ``raw_bytes``, ``stored_bytes`` (tiles and index), ``ratio``, ``entropy_bytes``
        (order-0 bound of the bytes), ``tiles`` and ``bypass_tiles`` (stored raw).

    Raises:
        MsQuantError: the directory is no W8A8SC checkpoint, a tile cannot be decoded, or the page
            cannot be made.
    """
    directory = Path(directory)
    if plot is not None:
        report.check_page(plot, directory)
    if is_slim(directory):
        slim = SlimDirectory(directory)
        result, coded = slim_summary(slim), slim_linears(slim, workers)
    else:
        result, coded = summary(directory), sparse_linears(open_sparse(directory, workers))
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


def sparse_linears(model: SparseModel) -> Iterator[Coded]:
    """The compressed linears of a checkpoint of ranks."""
    for _, group, fused in model.layout.linears():
        if fused in model.layout.compressed:
            n, k = fused_shape(model.config, model.layout.tp, group)
            for rank, tensors in enumerate(model.ranks):
                length = tensors.info(f"{fused}.weight").shape[0]
                sizes = linear_sizes(
                    fused, rank, [n, k], n * k, length, tensors.read(f"{fused}.index")
                )
                yield sizes, partial(model.decode, rank, fused, group)


def slim_linears(slim: SlimDirectory, workers: int) -> Iterator[Coded]:
    """The compressed linears of a directory of msModelSlim."""
    for path, coding in slim.coded.items():
        n, k = slim.shape(path)
        length = slim.info(f"{path}.weight").shape[0]
        index = slim.checkpoint.read(f"{path}.index")
        sizes = linear_sizes(path, 0, [n, k], n * k * coding.dtype.itemsize, length, index)
        yield sizes, partial(slim.decode, path, workers)


def linear_sizes(
    layer: str, rank: int, shape: list[int], raw: int, length: int, index: NDArray[np.int8]
) -> dict[str, Any]:
    """The sizes of a compressed linear, from its index."""
    records = index.view("<u8")
    stored = length + records.nbytes
    coded = int(np.count_nonzero(records & np.uint64(CODED_BIT)))
    return {
        "layer": layer,
        "rank": rank,
        "shape": shape,
        "raw_bytes": raw,
        "stored_bytes": stored,
        "ratio": stored / raw,
        "tiles": records.size,
        "bypass_tiles": records.size - coded,
    }


def slim_summary(slim: SlimDirectory) -> dict[str, Any]:
    """What a directory of msModelSlim is, from its description and its headers.

    Returns:
        JSON: ``output``, ``format``, ``target``; ``compressed_linears`` and ``uncompressed``
        (path to reason); ``raw_bytes``, ``stored_bytes`` (tiles and index) and ``ratio`` of the
        compressed linears; ``tensor_bytes`` of all tensors; ``codec_note``. Of one that is not
        compressed only ``output``, ``format``, ``quantized_linears`` and ``tensor_bytes``.
    """
    codings = [*slim.coded.values()] or [*slim.plain.values()]
    infos = map(slim.info, slim.checkpoint.names)
    found = {
        "output": str(slim.directory),
        "format": "+".join(sorted({c.coded if slim.coded else c.plain for c in codings})),
        "tensor_bytes": sum(info.stop - info.start for info in infos),
    }
    if not slim.coded:
        return {**found, "quantized_linears": len(slim.plain)}
    plain = {path: slim.info(f"{path}.weight").shape for path in slim.plain}
    return {
        **found,
        "target": TARGET.name,
        "compressed_linears": len(slim.coded),
        "uncompressed": {path: slim.plain[path].left(shape) for path, shape in plain.items()},
        **_totals([sizes for sizes, _ in slim_linears(slim, 1)]),
        "codec_note": backend_note(),
    }


def _totals(sizes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    raw = sum(row["raw_bytes"] for row in sizes)
    stored = sum(row["stored_bytes"] for row in sizes)
    return {"raw_bytes": raw, "stored_bytes": stored, "ratio": stored / raw if raw else 1.0}


def summary(directory: Path) -> dict[str, Any]:
    """What a finished checkpoint is, from its record, its proofs and its headers.

    Returns:
        JSON: ``output``, ``format``, ``target``, ``tp``, ``sparsity`` asked for, ``pruning``,
        ``algorithm``; of rate-distortion rounding its goal, ``price``, ``predicted_ratio`` and,
        where they were measured, ``float_perplexity`` and ``perplexity``;
        ``compressed_linears`` (of one rank) and ``uncompressed`` (path to reason);
        ``raw_bytes``, ``stored_bytes`` (tiles and index) and ``ratio`` of the compressed linears
        of all ranks; ``tensor_bytes`` of all tensors of all ranks; ``weights``: counts over the
        compressed linears (``size``, ``pruned``, ``source_zeros`` that were 0 before pruning and
        were not chosen by it, ``rounded`` to 0, ``zeros`` in all, ``input_scale_raised`` values to
        the smallest normal float16), None where ``compress`` made it; ``float16_lost`` (tensor to
        counts); ``float16_range`` and ``float16_warnings`` of activations; ``codec_note``.

    Raises:
        MsQuantError: the directory is no such checkpoint, or its structure is wrong.
    """
    model = open_sparse(directory)
    value = read_json(directory / RECORD, MAX_RECORD_BYTES)
    record = value.get("record")
    if not isinstance(record, dict):
        raise MsQuantError(f"{directory / RECORD}: has no record, expected what was computed")
    return {
        "output": str(directory),
        "format": model.format,
        "target": model.layout.target.name,
        "tp": model.layout.tp,
        **{key: record[key] for key in ("sparsity", "pruning", "algorithm") if key in record},
        **_rate(record.get("rate"), value.get("rate")),
        "compressed_linears": len(model.layout.compressed),
        "uncompressed": value.get("uncompressed", {}),
        **_totals([sizes for sizes, _ in sparse_linears(model)]),
        "tensor_bytes": sum(rank.bytes for rank in model.ranks),
        "weights": None if COMMAND in record else _weight_counts(directory, model.layout),
        "float16_lost": value.get("float16_lost", {}),
        **float16_facts(value, str(directory / RECORD)),
        "codec_note": backend_note(),
    }


def _rate(goal: Any, found: Any) -> dict[str, Any]:
    """The goal of rate-distortion rounding and what it led to, numbers only."""
    both = {
        **(goal if isinstance(goal, dict) else {}),
        **(found if isinstance(found, dict) else {}),
    }
    return {key: value for key, value in both.items() if isinstance(value, int | float)}


def _weight_counts(directory: Path, layout: Layout) -> dict[str, int]:
    total = dict.fromkeys(COUNTS, 0)
    for index in range(layout.config.num_layers):
        for counts in Proof(directory, layout, index).counts().values():
            for key in COUNTS:
                total[key] += counts.get(key, 0)
    return total
