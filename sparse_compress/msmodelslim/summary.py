"""What a directory of msModelSlim holds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from sparse_compress.codec import backend_note
from sparse_compress.layouts.msmodelslim import TARGET
from sparse_compress.msmodelslim.directory import ModelSlimDirectory
from sparse_compress.ranks.sizes import Coded, linear_sizes, totals


def msmodelslim_linears(model: ModelSlimDirectory, workers: int) -> Iterator[Coded]:
    """The compressed linears of a directory of msModelSlim."""
    for path, coding in model.coded.items():
        n, k = model.shape(path)
        length = model.info(f"{path}.weight").shape[0]
        index = model.checkpoint.read(f"{path}.index")
        sizes = linear_sizes(path, 0, [n, k], n * k * coding.dtype.itemsize, length, index)
        yield sizes, partial(model.decode, path, workers)


def msmodelslim_summary(model: ModelSlimDirectory) -> dict[str, Any]:
    """What a directory of msModelSlim is, from its description and its headers.

    Returns:
        JSON: ``output``, ``format``, ``target``; ``compressed_linears`` and ``uncompressed``
        (path to reason); ``raw_bytes``, ``stored_bytes`` (tiles and index) and ``ratio`` of the
        compressed linears; ``tensor_bytes`` of all tensors; ``codec_note``. Of one that is not
        compressed only ``output``, ``format``, ``quantized_linears`` and ``tensor_bytes``.
    """
    codings = [*model.coded.values()] or [*model.plain.values()]
    infos = map(model.info, model.checkpoint.names)
    found = {
        "output": str(model.directory),
        "format": "+".join(sorted({c.coded if model.coded else c.plain for c in codings})),
        "tensor_bytes": sum(info.stop - info.start for info in infos),
    }
    if not model.coded:
        return {**found, "quantized_linears": len(model.plain)}
    plain = {path: model.info(f"{path}.weight").shape for path in model.plain}
    return {
        **found,
        "target": TARGET.name,
        "compressed_linears": len(model.coded),
        "uncompressed": {path: model.plain[path].left(shape) for path, shape in plain.items()},
        **totals([sizes for sizes, _ in msmodelslim_linears(model, 1)]),
        "codec_note": backend_note(),
    }
