"""A checkpoint against the float model it was made from: what can be made again is, bit for bit.

Where an algorithm moves codes, or smoothing was folded where it cannot be read, the error of the
linear's output is measured instead; where not even that can be known, the linear is left out, and
the result says so.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ms_quant.algorithms import has
from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.files.reader import CHUNK_ELEMENTS, Checkpoint, FloatTensors
from ms_quant.formats.checks import format_of
from ms_quant.formats.companions import source_problems
from ms_quant.formats.opening import QuantizedModel
from ms_quant.job.output_directory import RECORD
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import block_prefix
from ms_quant.numerics.activation import StaticActivation
from ms_quant.numerics.grid import AffineFormat
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.plan.layer import LayerPlan, recorded_layer
from ms_quant.plan.plan import Plan
from ms_quant.quantization.divided import as_divided
from ms_quant.quantization.rotated import RotatedCheckpoint
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.storage import SmoothingTarget
from ms_quant.statistics import activation_range
from ms_quant.verify.folding import Folding
from ms_quant.verify.requantize import Comparison, OutputError, ScaleRule
from ms_quant.verify.requantize_grid import GridComparison, some_rows
from ms_quant.verify.result import ComparedLinear, SourceFindings

MAX_OUTPUT_ERROR = 0.1
FOUR_BITS, BOTH_FOUR_BITS = 0.35, 0.5
PRUNED = 0.55


def max_output_error(scheme: Scheme) -> float:
    """The largest relative output error that is taken for quantization.

    On random gaussian weights of up to 16,384 inputs it is at most 0.05 with 8 bits, 0.18 with
    weights of 4 and 0.25 with inputs of 4, too, 0.14 with 30 % and 0.5 with 70 % of the weights
    zero; another weight has 1.4.
    """
    if scheme.weight.bits == 16:
        return PRUNED
    if scheme.weight.bits == 8 and not scheme.algorithm:
        return MAX_OUTPUT_ERROR
    return BOTH_FOUR_BITS if scheme.activation.bits == 4 else FOUR_BITS


@dataclass
class Subject:
    """What is being verified; its structure is right.

    Attributes:
        model: the checkpoint's reader.
        plan: what it holds.
        record: the content of its ``ms_quant.json``.
        activations: group to the parameters of its input, as far as they were found right.
    """

    model: QuantizedModel
    plan: Plan
    record: dict[str, Any]
    activations: dict[str, StaticActivation] = field(default_factory=dict)

    def has(self, path: str, attribute: str) -> bool:
        """Whether an algorithm of a group, by its full path prefix, has a flag."""
        return has(recorded_layer(self.record["record"], path)["algorithm"], attribute)

    def folded(self) -> set[str]:
        """The groups, by full path prefix, whose smoothing was folded."""
        return {
            str(group)
            for group, layer in self.plan.layers.items()
            if layer is not None
            and layer.storage.target is SmoothingTarget.NORM
            and self.has(str(group), "smooths")
        }


@dataclass
class SourceProof:
    """The comparison with the source.

    Args:
        subject: the checkpoint.
        source: the float model.
        config: of that model.
        comparison: gets what is compared.
    """

    subject: Subject
    source: FloatTensors
    config: ModelConfig
    comparison: SourceFindings

    def problems(self) -> Iterator[str]:
        """Compares everything; one sentence for each difference."""
        subject, plan = self.subject, self.subject.plan
        ours = subject.model.checkpoint
        config = self.config
        if "quarot" in subject.record["record"]["algorithm"].split("+"):
            try:
                rotated = _rotated(self.source, config, subject.record["record"])
            except MsQuantError as error:
                yield str(error)
                return
            self.source, config = rotated, rotated.config
        shapes = plan.config.parameter_shapes()
        if shapes != config.parameter_shapes():
            yield f"{self.source.directory}: another model than {ours.directory}"
            return
        try:
            self.source = _as_divided(self.source, config, subject.record)
        except MsQuantError as error:
            yield str(error)
            return
        directories, entry = (ours.directory, self.source.directory), format_of(plan).entry
        yield from source_problems(*directories, plan.dtype, config, entry)
        self.folding = Folding(plan, ours, self.source, subject.folded(), subject.model.stored_name)
        changed, quantized = self.folding.changed(), set(plan.quantized())
        types = {t.source or t.name: t.dtype for t in format_of(plan).tensor_plans(plan)}
        for name in shapes:
            path, _, suffix = name.rpartition(".")
            if path in quantized and suffix == "weight":
                continue
            if name in changed:
                yield from self.folding.problems(name)
            elif not same_rounded(ours, subject.model.stored_name(name), self.source, name, types):
                yield f"{name}: differs from {self.source.directory} rounded to {types[name].name}"
        for index in range(plan.config.num_blocks):
            scaled = self.folding.scaled_rows(index)
            for group in plan.groups(index):
                yield from self._group_problems(index, group, scaled)

    def _group_problems(
        self, index: int, group: LinearGroup, scaled: Container[str]
    ) -> Iterator[str]:
        paths = [f"{block_prefix(index)}{member}" for member in group.members]
        if self.folding.is_unknown(index, group):
            self.comparison.unknown += paths
            return
        smooth = self.folding.smooth(index, group)
        for path, member in zip(paths, group.members, strict=True):
            linear = self.subject.model.linear(path)
            assert linear is not None
            name = f"{block_prefix(index)}{group.name}"
            layer, subject = self.subject.plan.layer(index, group), self.subject
            compared = _Compared(
                subject, layer, name, self.source, path, linear, smooth, member in scaled
            )
            yield from compared.problems(self.subject.activations.get(name))
            found = ComparedLinear(path, compared.error.value, compared.made_again)
            self.comparison.layers.append(found)


def _as_divided(
    source: FloatTensors, config: ModelConfig, record: Mapping[str, Any]
) -> FloatTensors:
    """The source as its activations were brought into the range of float16."""
    entries, where = record.get(activation_range.KEY), f"{RECORD}: {activation_range.KEY}"
    return as_divided(source, config, entries, where)


def _rotated(
    source: FloatTensors, config: ModelConfig, record: Mapping[str, Any]
) -> RotatedCheckpoint:
    """The source as it was rotated before anything else."""
    options = record.get("algorithm_options")
    chosen = options.get("quarot") if isinstance(options, Mapping) else None
    found = chosen if isinstance(chosen, Mapping) else {}
    numbers = {"seed": found.get("seed"), "block_size": found.get("block_size", 0)}
    for name, value in numbers.items():
        if type(value) is not int or value < 0:
            raise BadFileError(
                f"ms_quant.json: algorithm_options: quarot.{name} is {value!r:.80}, expected that "
                "of the rotation"
            )
    assert isinstance(source, Checkpoint)
    return RotatedCheckpoint(source, config, **numbers)


@dataclass
class _Compared:
    """One linear beside its source, some rows at a time.

    Attributes:
        layer: what it is.
        name: of its group.
        smooth: float32 (in,), what folding multiplied its columns by, or None.
        scaled: whether folding divided its rows, by what is not known.
    """

    subject: Subject
    layer: LayerPlan
    name: str
    source: FloatTensors
    path: str
    linear: QuantizedLinear
    smooth: np.ndarray | None
    scaled: bool

    def __post_init__(self) -> None:
        self.error = OutputError(self.linear.activation, self.linear.weight.shape[1])
        format = self.layer.scheme.weight
        shared = isinstance(format, AffineFormat) and format.per_tensor and self._has("clips")
        moved = self._has("moves_codes") or self._has("adds")
        self.made_again = not (moved or self.scaled or shared)

    def _has(self, attribute: str) -> bool:
        return self.subject.has(self.name, attribute)

    def problems(self, recorded: StaticActivation | None) -> Iterator[str]:
        """Compares it.

        Args:
            recorded: the parameters of a static input, as the record states them.
        """
        format, shape = self.layer.scheme.weight, self.linear.weight.shape
        by_row = self._scale_rule(recorded)
        rows, grid = Comparison(), self._grid_comparison()
        inside = self.linear.smooth
        if inside is None and recorded is not None:
            inside = recorded.smooth
        for start, weight in self._chunks():
            part = some_rows(self.linear, format, slice(start, start + len(weight)))
            self.error.add(part, _scaled(weight, part) if self.scaled else weight)
            if not self.made_again:
                continue
            if inside is not None:
                with np.errstate(over="ignore", under="ignore"):  # a forged scale; rules refuse inf
                    weight = weight * inside
            if by_row is None:
                grid.add(start, weight, part)
            else:
                rows.add(start, weight, part, by_row)
        suffix = "weight_scale" if recorded is None or self._has_scale() else "deq_scale"
        yield from rows.problems(self.path, suffix, shape)
        yield from grid.problems(self.path, shape)
        limit = max_output_error(self.layer.scheme)
        if not self.error.value <= limit:
            yield (
                f"{self.path}: relative output error {self.error.value:.3f} against "
                f"{self.source.directory}, expected at most {limit}"
            )

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        rows = getattr(self.layer.scheme.weight, "row_block", 1)  # chunks are of whole blocks
        columns = self.linear.weight.shape[1]
        elements = columns * max(rows, CHUNK_ELEMENTS // max(1, columns) // rows * rows)
        for start, weight in self.source.float32_chunks(f"{self.path}.weight", elements):
            yield start, weight if self.smooth is None else weight * self.smooth

    def _has_scale(self) -> bool:
        return f"{self.path}.weight_scale" in self.subject.model.checkpoint.names

    def _scale_rule(self, recorded: StaticActivation | None) -> ScaleRule | None:
        """How stored scales follow from rows of int8; None for all other weights."""
        scheme = self.layer.scheme
        format = scheme.weight
        if not isinstance(format, AffineFormat) or not self.linear.integer or format.bits != 8:
            return None
        dtype = self.layer.storage.scale_dtype
        factor = np.float32(1) if recorded is None or self._has_scale() else recorded.scale
        absmax = None
        if format.per_tensor:
            absmax = np.float32(max(np.abs(w).max(initial=0) for _, w in self._chunks()))
        converted = self._has_scale() and isinstance(self.linear.activation, StaticActivation)
        step = recorded.scale if recorded is not None and converted else None
        return ScaleRule(self._has("clips"), dtype, factor, absmax, step)

    def _grid_comparison(self) -> GridComparison:
        scheme = self.layer.scheme
        return GridComparison(scheme.weight, self.layer.storage.scale_dtype, self._has("clips"))


def _scaled(weight: np.ndarray, part: QuantizedLinear) -> np.ndarray:
    """Rows of a weight times the factor, one a row, that brings each nearest to what is stored."""
    stored = part.float_weight()
    norm = np.square(weight).sum(axis=1)
    factor = (stored * weight).sum(axis=1) / np.where(norm > 0, norm, 1)
    return weight * np.where(factor > 0, factor, 1)[:, None]


def same_rounded(
    ours: FloatTensors,
    stored: str,
    source: FloatTensors,
    name: str,
    types: Mapping[str, np.dtype],
) -> bool:
    """Whether a float tensor is the source's rounded to its type, bit for bit."""
    same, dtype = True, types[name]
    chunks = zip(ours.float32_chunks(stored), source.float32_chunks(name), strict=True)
    for (_, found), (_, exact) in chunks:
        with np.errstate(over="ignore"):
            expected = exact.astype(dtype).astype(np.float32)
        same &= np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    return same
