"""What a directory of msModelSlim holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from sparse_compress.codec import backend_note
from sparse_compress.layouts.msmodelslim import TARGET
from sparse_compress.msmodelslim.directory import ModelSlimDirectory
from sparse_compress.ranks.sizes import Coded, linear_sizes, totals
from sparse_compress.ranks.summary import RankSummary


def msmodelslim_linears(model: ModelSlimDirectory, workers: int) -> Iterator[Coded]:
    """The compressed linears of a directory of msModelSlim."""
    for path, coding in model.coded.items():
        n, k = model.shape(path)
        length = model.info(f"{path}.weight").shape[0]
        index = model.checkpoint.read(f"{path}.index")
        sizes = linear_sizes(path, 0, [n, k], n * k * coding.dtype.itemsize, length, index)
        yield sizes, partial(model.decode, path, workers)


@dataclass(frozen=True)
class PlainDirectory:
    """What a directory of msModelSlim is whose weights are not compressed.

    Attributes:
        path: the directory.
        format: the types of the quantized weights, joined with ``+``.
        tensor_bytes: bytes of all tensors.
        quantized_linears: how many linears are quantized.
    """

    path: Path
    format: str
    tensor_bytes: int
    quantized_linears: int

    def as_json(self) -> dict[str, Any]:
        """What the commands print of it."""
        return {
            "output": str(self.path),
            "format": self.format,
            "tensor_bytes": self.tensor_bytes,
            "quantized_linears": self.quantized_linears,
        }


@dataclass(frozen=True)
class CompressedDirectory:
    """What a directory of msModelSlim is whose weights are compressed.

    Attributes:
        path: the directory.
        format: the types of the compressed weights, joined with ``+``.
        tensor_bytes: bytes of all tensors.
        target: what reads it.
        compressed_linears: how many linears are compressed.
        uncompressed: path of a linear that is quantized and not compressed, to the reason.
        raw_bytes: bytes of the weights of the compressed linears.
        stored_bytes: bytes of their tiles and indices.
        ratio: stored over raw.
        codec_note: why the codec is slow, where it is.
    """

    path: Path
    format: str
    tensor_bytes: int
    target: str
    compressed_linears: int
    uncompressed: Mapping[str, str]
    raw_bytes: int
    stored_bytes: int
    ratio: float
    codec_note: str | None

    def as_json(self) -> dict[str, Any]:
        """What the commands print of it."""
        return {
            "output": str(self.path),
            "format": self.format,
            "tensor_bytes": self.tensor_bytes,
            "target": self.target,
            "compressed_linears": self.compressed_linears,
            "uncompressed": dict(self.uncompressed),
            "raw_bytes": self.raw_bytes,
            "stored_bytes": self.stored_bytes,
            "ratio": self.ratio,
            "codec_note": self.codec_note,
        }


def plain_summary(model: ModelSlimDirectory) -> PlainDirectory:
    """What a directory is that is not compressed, from its description and its headers."""
    types = {coding.plain for coding in model.plain.values()}
    return PlainDirectory(
        model.directory, "+".join(sorted(types)), _tensor_bytes(model), len(model.plain)
    )


def compressed_summary(model: ModelSlimDirectory) -> CompressedDirectory:
    """What a compressed directory is, from its description and its headers."""
    plain = {path: model.info(f"{path}.weight").shape for path in model.plain}
    return CompressedDirectory(
        path=model.directory,
        format="+".join(sorted({coding.coded for coding in model.coded.values()})),
        tensor_bytes=_tensor_bytes(model),
        target=TARGET.name,
        compressed_linears=len(model.coded),
        uncompressed={path: model.plain[path].left(shape) for path, shape in plain.items()},
        **totals([sizes for sizes, _ in msmodelslim_linears(model, 1)]),
        codec_note=backend_note(),
    )


def _tensor_bytes(model: ModelSlimDirectory) -> int:
    infos = map(model.info, model.checkpoint.names)
    return sum(info.stop - info.start for info in infos)


Summary = TypeVar("Summary", bound="RankSummary | PlainDirectory | CompressedDirectory")


@dataclass(frozen=True)
class Rewritten(Generic[Summary]):
    """A checkpoint that was made from one that is quantized already.

    Attributes:
        summary: what it is.
        finished_before: whether there was nothing left to do.
        not_served_by: why a runtime cannot load it, in sentences; None where it is for none.
    """

    summary: Summary
    finished_before: bool
    not_served_by: tuple[str, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """What the commands print of it."""
        said = {} if self.not_served_by is None else {"not_served_by": list(self.not_served_by)}
        return {**self.summary.as_json(), **said, "finished_before": self.finished_before}
