"""What a job has made, for programs and as the JSON of the commands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ms_quant.files.strict_json import read_json
from ms_quant.formats.checks import not_served_by, served_by
from ms_quant.job.finished import Measured
from ms_quant.job.output_directory import MAX_RECORD_BYTES, RECORD
from ms_quant.models.names import GroupId
from ms_quant.pipeline.expert_report import expert_lines
from ms_quant.pipeline.warnings import quality_warnings
from ms_quant.pipeline.writer import output_bytes
from ms_quant.plan.plan import Plan
from ms_quant.schemes.table import FLOAT_CACHE
from ms_quant.statistics.activation_range import float16_facts


@dataclass(frozen=True)
class GroupReport:
    """What became of a group of linears that read one input.

    Attributes:
        group: its path, such as ``"model.layers.0.qkv"``.
        scheme: what its linears are; ``"FLOAT"`` for those that stay float.
        algorithm: how their numbers were chosen; "" for those that stay float.
        chosen: what the algorithms chose, by name: ``alpha`` and ``loss`` of a smoothing search,
            ``range`` of a searched input range, and so on.
        seconds: what choosing and rounding took, in whatever call it was done; the forward of its
            block, which all groups share, is not in it. None of those that stay float, and where
            the job is gone.
        error: squared error over squared output of its linears together, in the mean over some
            calibration tokens; in decode, where that is worse. None of those that stay float,
            without calibration, and where the job is gone.
    """

    group: str
    scheme: str
    algorithm: str
    chosen: Mapping[str, Any]
    seconds: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Float16Facts:
    """How near the activations of a model that runs in float16 come to the end of float16.

    Attributes:
        range: the largest one in one line, or that none was looked at.
        warnings: sentences about those that come near the end.
    """

    range: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Output:
    """A checkpoint of one format that was made.

    Attributes:
        path: its directory.
        format: name of the checkpoint format.
        scheme: names of the schemes, joined with ``+``.
        algorithm: names of the algorithms.
        kv_cache: how keys and values are cached.
        dtype: type of what stays float.
        tensor_bytes: bytes of all tensors.
        quantized_linears: how many linears are quantized.
        float_linears: paths of those that stay float.
        served_by: the runtimes that load it.
        not_served_by: why others do not, in sentences.
        finished_before: whether it was there already.
        report: what became of each group of linears.
        float16: of a model for float16, how large its activations get.
        experts: of a model with experts, how many calibration tokens they saw, in sentences.
    """

    path: Path
    format: str
    scheme: str
    algorithm: str
    kv_cache: str
    dtype: str
    tensor_bytes: int
    quantized_linears: int
    float_linears: tuple[str, ...]
    served_by: tuple[str, ...]
    not_served_by: tuple[str, ...]
    finished_before: bool
    report: tuple[GroupReport, ...] = field(repr=False)
    float16: Float16Facts | None = None
    experts: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is bad about it, in sentences."""
        return tuple(quality_warnings(self.report))

    def as_json(self) -> dict[str, Any]:
        """What the command prints of it."""
        found: dict[str, Any] = {
            "output": str(self.path),
            "format": self.format,
            "scheme": self.scheme,
            "algorithm": self.algorithm,
            "kv_cache": self.kv_cache,
            "dtype": self.dtype,
            "tensor_bytes": self.tensor_bytes,
            "quantized_linears": self.quantized_linears,
            "float_linears": list(self.float_linears),
            "served_by": list(self.served_by),
            "not_served_by": list(self.not_served_by),
            "finished_before": self.finished_before,
        }
        if self.experts:
            found["experts"] = list(self.experts)
        if self.warnings:
            found["warnings"] = list(self.warnings)
        if self.float16 is not None:
            found["float16_range"] = self.float16.range
            if self.float16.warnings:
                found["float16_warnings"] = list(self.float16.warnings)
        return found


@dataclass(frozen=True)
class Result:
    """What :func:`ms_quant.quantize_checkpoint` has made.

    Attributes:
        outputs: a checkpoint for each format, in the order that was asked for.
        notes: what was found in the model, the data or the recipe and should be known, one sentence
            each.
        seconds: what this call took.
    """

    outputs: tuple[Output, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def finished_before(self) -> bool:
        """Whether there was nothing left to do."""
        return all(output.finished_before for output in self.outputs)

    @property
    def not_served_by(self) -> tuple[str, ...]:
        """Why runtimes do not load one of the outputs, each sentence once."""
        return tuple(dict.fromkeys(line for one in self.outputs for line in one.not_served_by))


def output_of(
    plan: Plan,
    directory: Path,
    finished_before: bool,
    *,
    calibrated: bool,
    measured: Mapping[GroupId, Measured],
) -> Output:
    """The record of a finished checkpoint.

    Args:
        plan: what it holds.
        directory: where it is.
        finished_before: whether it was there already.
        calibrated: whether its activations were looked at; of a model for float16 the record says
            then how large they get.
        measured: what is known of its groups.

    Raises:
        MsQuantError: its record is malformed.
    """
    path = directory / RECORD
    record = read_json(path, MAX_RECORD_BYTES)
    return Output(
        path=directory,
        format=plan.format,
        scheme=plan.scheme_name,
        algorithm=plan.algorithm,
        kv_cache=plan.kv_cache or FLOAT_CACHE,
        dtype=plan.dtype.name,
        tensor_bytes=output_bytes(plan),
        quantized_linears=len(plan.quantized()),
        float_linears=tuple(plan.float_linears()),
        served_by=tuple(served_by(plan)),
        not_served_by=tuple(not_served_by(plan)),
        finished_before=finished_before,
        report=tuple(_reports(plan, record.get("chosen"), measured)),
        experts=expert_lines(record, str(path)),
        float16=_float16(record, path) if calibrated and plan.dtype.name == "float16" else None,
    )


def _reports(
    plan: Plan, chosen: Any, measured: Mapping[GroupId, Measured]
) -> Iterator[GroupReport]:
    """What a record says of each group; of a checkpoint that others made it says nothing."""
    blocks = chosen if isinstance(chosen, Mapping) else {}
    for group, layer in plan.layers.items():
        block = blocks.get(f"block {group.block}")
        notes = block.get(group.name) if isinstance(block, Mapping) else None
        said = notes if isinstance(notes, Mapping) else {}
        if layer is None:
            yield GroupReport(str(group), "FLOAT", "", {})
        else:
            scheme, algorithm = layer.scheme.name, layer.algorithms.name
            yield GroupReport(str(group), scheme, algorithm, said, *measured.get(group, ()))


def _float16(record: Mapping[str, Any], path: Path) -> Float16Facts:
    found = float16_facts(record, str(path))
    return Float16Facts(found["float16_range"], tuple(found.get("float16_warnings", ())))
