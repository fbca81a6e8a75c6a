"""What a W8A8SC checkpoint of ranks holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ms_quant.errors import MsQuantError
from ms_quant.files.strict_json import read_json
from ms_quant.job.output_directory import MAX_RECORD_BYTES, RECORD
from ms_quant.statistics.activation_range import float16_facts
from sparse_compress.codec import CORES, backend_note
from sparse_compress.layouts import Layout
from sparse_compress.layouts.partition import fused_shape
from sparse_compress.ranks.proof import Proof
from sparse_compress.ranks.reader import SparseModel, open_w8a8sc
from sparse_compress.ranks.sizes import Coded, linear_sizes, totals

COMMAND = "command"
"""Key of a record that ``run`` did not write."""
MADE_BY = ("sparsity", "pruning", "algorithm")
COUNTS = ("size", "pruned", "source_zeros", "rounded", "zeros", "input_scale_raised")


def open_sparse(directory: Path, workers: int = CORES) -> SparseModel:
    """Opens a W8A8SC checkpoint.

    Raises:
        MsQuantError: the directory is none, or its structure is wrong.
    """
    model = open_w8a8sc(directory, workers)
    if not isinstance(model, SparseModel):
        raise MsQuantError(f"{directory}: is no W8A8SC checkpoint")
    return model


def sparse_linears(model: SparseModel) -> Iterator[Coded]:
    """The compressed linears of a checkpoint of ranks."""
    for _, group, fused in model.layout.linears():
        if fused in model.layout.compressed:
            n, k = fused_shape(group, model.layout.tp)
            for rank, tensors in enumerate(model.ranks):
                length = tensors.info(f"{fused}.weight").shape[0]
                sizes = linear_sizes(
                    fused, rank, [n, k], n * k, length, tensors.read(f"{fused}.index")
                )
                yield sizes, partial(model.decode, rank, fused, group)


@dataclass(frozen=True)
class RankSummary:
    """What a finished checkpoint of ranks is, from its record, its proofs and its headers.

    Attributes:
        path: its directory.
        format: what to call it.
        target: name of the runtime that it is for.
        tp: how many ranks it has.
        made_by: ``sparsity`` asked for, ``pruning`` and ``algorithm``, as far as they apply.
        rate: of rate-distortion rounding its goal, ``price``, ``predicted_ratio`` and, where they
            were measured, ``float_perplexity`` and ``perplexity``.
        compressed_linears: how many linears of one rank are compressed.
        uncompressed: path of a linear that is not, to the reason.
        raw_bytes: bytes of the weights of the compressed linears of all ranks.
        stored_bytes: bytes of their tiles and indices.
        ratio: stored over raw.
        tensor_bytes: bytes of all tensors of all ranks.
        weights: counts over the compressed linears: ``size``, ``pruned``, ``source_zeros`` that
            were 0 before pruning and were not chosen by it, ``rounded`` to 0, ``zeros`` in all, and
            ``input_scale_raised`` values to the smallest normal float16. None where ``compress``
            made it.
        float16_lost: name of a float tensor to counts of what float16 does not hold of it.
        float16_range: the largest activation in one line, or that none was looked at.
        float16_warnings: sentences about those that come near the end of float16.
        codec_note: why the codec is slow, where it is.
    """

    path: Path
    format: str
    target: str
    tp: int
    made_by: Mapping[str, Any]
    rate: Mapping[str, float]
    compressed_linears: int
    uncompressed: Mapping[str, str]
    raw_bytes: int
    stored_bytes: int
    ratio: float
    tensor_bytes: int
    weights: Mapping[str, int] | None
    float16_lost: Mapping[str, Mapping[str, int]]
    float16_range: str
    float16_warnings: tuple[str, ...]
    codec_note: str | None

    def as_json(self) -> dict[str, Any]:
        """What the commands print of it."""
        warnings = list(self.float16_warnings)
        return {
            "output": str(self.path),
            "format": self.format,
            "target": self.target,
            "tp": self.tp,
            **self.made_by,
            **self.rate,
            "compressed_linears": self.compressed_linears,
            "uncompressed": dict(self.uncompressed),
            "raw_bytes": self.raw_bytes,
            "stored_bytes": self.stored_bytes,
            "ratio": self.ratio,
            "tensor_bytes": self.tensor_bytes,
            "weights": None if self.weights is None else dict(self.weights),
            "float16_lost": dict(self.float16_lost),
            "float16_range": self.float16_range,
            **({"float16_warnings": warnings} if warnings else {}),
            "codec_note": self.codec_note,
        }


def summary(directory: Path) -> RankSummary:
    """What a finished checkpoint is.

    Raises:
        MsQuantError: the directory is no such checkpoint, or its structure is wrong.
    """
    model = open_sparse(directory)
    value = read_json(directory / RECORD, MAX_RECORD_BYTES)
    record = value.get("record")
    if not isinstance(record, dict):
        raise MsQuantError(f"{directory / RECORD}: has no record, expected what was computed")
    facts = float16_facts(value, str(directory / RECORD))
    return RankSummary(
        path=directory,
        format=model.format,
        target=model.layout.target.name,
        tp=model.layout.tp,
        made_by={key: record[key] for key in MADE_BY if key in record},
        rate=_rate(record.get("rate"), value.get("rate")),
        compressed_linears=len(model.layout.compressed),
        uncompressed=value.get("uncompressed", {}),
        **totals([sizes for sizes, _ in sparse_linears(model)]),
        tensor_bytes=sum(rank.bytes for rank in model.ranks),
        weights=None if COMMAND in record else _weight_counts(directory, model.layout),
        float16_lost=value.get("float16_lost", {}),
        float16_range=facts["float16_range"],
        float16_warnings=tuple(facts.get("float16_warnings", ())),
        codec_note=backend_note(),
    )


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
