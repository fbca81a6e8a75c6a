"""Proof that a golden-stick checkpoint is what its runtime expects, and what its source says.

Nothing is run. Structure, types and values are checked tensor by tensor; with the source, every
int8 weight is made again and compared bit for bit, some rows in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.algorithms import ALGORITHMS, PLAIN, has, is_known
from ms_quant.checkpoint.activations import recorded_activation, unsmoothed_problem
from ms_quant.checkpoint.companions import config_problems, source_problems
from ms_quant.checkpoint.finish import MAX_RECORD_BYTES, RECORD, check_files, unlisted_files
from ms_quant.checkpoint.reader import Checkpoint, check_model
from ms_quant.checkpoint.serving import QuantizedModel
from ms_quant.checkpoint.structure import Structure, check_kind, read_structure
from ms_quant.errors import MsQuantError
from ms_quant.models.config import block_prefix, load_config
from ms_quant.models.families import LinearGroup
from ms_quant.numerics.linear import QuantizedLinear, StaticActivation
from ms_quant.numerics.storage import weight_scale_dtype
from ms_quant.plan import Plan
from ms_quant.remake import ScaleRule, compare
from ms_quant.strict_json import read_json

MAX_OUTPUT_ERROR = 0.1


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

    @property
    def algorithm(self) -> str:
        return self.record["record"]["algorithm"]


def verify_checkpoint(directory: Path, source: Path | None = None) -> dict[str, Any]:
    """Checks a golden-stick checkpoint.

    Args:
        directory: the checkpoint.
        source: the float checkpoint that it was made from; with it every int8 weight is made
            again, every float tensor, ``config.json`` and the tokenizer files are compared, and
            the output error of every quantized linear is measured.

    Returns:
        ``problems`` (one sentence each; empty when the checkpoint is right), ``quantized`` and
        ``float`` counts, and with a source ``layers``: path and relative output error of each.

    Raises:
        MsQuantError: the checkpoint or the source cannot be read at all, or is of another kind.
    """
    check_kind(directory)
    original = None if source is None else _open_source(source)
    problems = list(_root_problems(directory))
    result: dict[str, Any] = {"checkpoint": str(directory), "problems": problems, "layers": []}
    if problems:
        return result
    structure, found = read_structure(directory)
    problems += found
    if structure is None:
        return result
    plan, record = structure.plan, read_json(directory / RECORD, MAX_RECORD_BYTES)
    result["quantized"], result["float"] = len(plan.quantized()), len(plan.float_linears())
    problems += config_problems(directory, plan.dtype)
    problems += _record_problems(directory / RECORD, record, plan)
    if problems:
        return result
    subject = Subject(QuantizedModel(directory), plan, record)
    for index in range(plan.config.num_layers):
        for group in plan.groups(index):
            problems += _group_problems(subject, block_prefix(index), group)
    problems += _float_problems(structure)
    if original is not None and not problems:
        problems += _source_problems(subject, original, result["layers"])
    return result


def _open_source(source: Path) -> Checkpoint:
    checkpoint = Checkpoint(source)
    check_model(checkpoint, load_config(source))
    return checkpoint


def _root_problems(directory: Path) -> Iterator[str]:
    yield from config_problems(directory)
    if (directory / RECORD).exists():
        yield from check_files(directory)
        yield from unlisted_files(directory)
    else:
        yield f"{directory}: has no {RECORD}, its files cannot be compared with what was written"


def _record_problems(path: Path, value: Mapping[str, Any], plan: Plan) -> Iterator[str]:
    """What the record says was done, against what the other files say."""
    record = value.get("record")
    if not isinstance(record, Mapping):
        yield f"{path}: record is {record!r:.80}, expected what was computed"
        return
    expected = {"dtype": plan.dtype.name}
    if plan.quantized():
        expected["scheme"] = plan.scheme.name
    for key, stated in expected.items():
        if record.get(key) != stated:
            yield f"{path}: {key} is {record.get(key)!r:.80}, expected {stated!r}"
    algorithm = record.get("algorithm")
    if not is_known(algorithm):
        known = ", ".join([PLAIN, *ALGORITHMS])
        yield f"{path}: algorithm is {algorithm!r:.80}, expected one of {known}"


def _group_problems(subject: Subject, prefix: str, group: LinearGroup) -> Iterator[str]:
    """What the linears of one group must have in common, and what the record says of it."""
    first: tuple[str, StaticActivation] | None = None
    for member in group.members:
        path = prefix + member
        try:
            linear = subject.model.linear(path)
        except MsQuantError as error:
            yield str(error)
            continue
        if linear is None or not isinstance(linear.activation, StaticActivation):
            continue
        if first is None:
            first = (path, linear.activation)
        elif linear.activation.offset != first[1].offset:
            yield f"{path}.input_offset: differs from that of {first[0]}, the runtime fuses them"
        elif not np.array_equal(linear.activation.input_scale, first[1].input_scale):
            yield f"{path}.input_scale: differs from that of {first[0]}, the runtime fuses them"
    if first is not None:
        yield from _activation_problems(subject, prefix + group.name, *first)


def _activation_problems(
    subject: Subject, name: str, path: str, found: StaticActivation
) -> Iterator[str]:
    """The parameters of a group's input against the record."""
    try:
        activation = recorded_activation(subject.record, name, path, found)
    except MsQuantError as error:
        yield str(error)
        return
    subject.activations[name] = activation
    if not has(subject.algorithm, "smooths"):
        wrong = unsmoothed_problem(activation, subject.plan.dtype, f"{path}.input_scale")
        if wrong:
            yield wrong


def _float_problems(structure: Structure) -> Iterator[str]:
    """Reads every float tensor, which refuses NaN and inf; scales must be positive too."""
    for name, tensor in structure.expected.items():
        if tensor.dtype.kind == "i":
            continue
        wrong = 0
        try:
            for _, part in structure.checkpoint.float32_chunks(name):
                wrong += int(np.count_nonzero(part <= 0)) if name.endswith("_scale") else 0
        except MsQuantError as error:
            yield str(error)
            continue
        if wrong:
            yield f"{name}: {wrong} scales are not positive, expected all to be"


def _source_problems(
    subject: Subject, source: Checkpoint, layers: list[dict[str, Any]]
) -> Iterator[str]:
    """Makes every tensor again from the source; ``layers`` gets the linears' output errors."""
    directory, plan = subject.model.checkpoint.directory, subject.plan
    shapes = plan.config.parameter_shapes()
    if shapes != load_config(source.directory).parameter_shapes():
        yield f"{source.directory}: another model than {directory}"
        return
    yield from source_problems(directory, source.directory, plan.dtype)
    groups = _groups_by_linear(plan)
    for name in shapes:
        path, _, suffix = name.rpartition(".")
        if path in groups and suffix == "weight":
            yield from _linear_problems(subject, source, path, groups[path], layers)
        elif not _same_rounded(subject.model.checkpoint, source, name, plan.dtype):
            yield f"{name}: differs from {source.directory} rounded to {plan.dtype.name}"


def _groups_by_linear(plan: Plan) -> dict[str, str]:
    """Full path of each quantized linear to that of its group."""
    return {
        f"{block_prefix(index)}{member}": f"{block_prefix(index)}{group.name}"
        for index in range(plan.config.num_layers)
        for group in plan.groups(index)
        for member in group.members
    }


def _linear_problems(
    subject: Subject, source: Checkpoint, path: str, group: str, layers: list[dict[str, Any]]
) -> Iterator[str]:
    linear = subject.model.linear(path)
    assert linear is not None
    suffix, smooth, rule = _remaking(subject, linear, group)
    chunks = source.float32_chunks(f"{path}.weight")
    comparison, error = compare(linear, smooth, chunks, rule)
    layers.append({"layer": path, "output_error": error})
    yield from comparison.problems(path, suffix, linear.weight.shape)
    if not error <= MAX_OUTPUT_ERROR:
        yield (
            f"{path}: relative output error {error:.3f} against {source.directory}, expected at "
            f"most {MAX_OUTPUT_ERROR}"
        )


def _remaking(
    subject: Subject, linear: QuantizedLinear, group: str
) -> tuple[str, np.ndarray | None, ScaleRule]:
    """The tensor that stores a linear's scales, its smoothing vector and the rule for scales."""
    clipped = has(subject.algorithm, "clips")
    if not isinstance(linear.activation, StaticActivation):
        return "weight_scale", None, ScaleRule(clipped, weight_scale_dtype(subject.plan.dtype))
    activation = subject.activations[group]
    return "deq_scale", activation.smooth, ScaleRule(clipped, factor=activation.scale)


def _same_rounded(ours: Checkpoint, source: Checkpoint, name: str, dtype: np.dtype) -> bool:
    """Whether a float tensor is the source's rounded to a type, bit for bit."""
    same = True
    chunks = zip(ours.float32_chunks(name), source.float32_chunks(name), strict=True)
    for (_, found), (_, exact) in chunks:
        with np.errstate(over="ignore"):
            expected = exact.astype(dtype).astype(np.float32)
        same &= np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    return same
