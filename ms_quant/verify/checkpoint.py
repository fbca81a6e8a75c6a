"""Proof that a checkpoint is what its runtime expects, and what its source says.

Nothing is run. Structure, types and values are checked tensor by tensor; with the source, weights
are made again and compared bit for bit, some rows in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.algorithms import ALGORITHMS, PLAIN, get_algorithms, is_known
from ms_quant.errors import MsQuantError, short
from ms_quant.files.strict_json import read_json
from ms_quant.formats.companions import config_problems
from ms_quant.formats.float_model import open_float
from ms_quant.formats.fused_norms import norm_of, quotient_notes
from ms_quant.formats.opening import QuantizedModel
from ms_quant.formats.source_kind import model_directory
from ms_quant.formats.structure import (
    PROVENANCE,
    Structure,
    check_kind,
    is_ours,
    read_structure,
)
from ms_quant.job.output_directory import MAX_RECORD_BYTES, RECORD, check_files
from ms_quant.job.unlisted import unlisted_problems
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.config import own_config
from ms_quant.models.names import GroupId, block_prefix
from ms_quant.models.spellings import spelling_problems
from ms_quant.numerics.activation import PhasedActivation, StaticActivation
from ms_quant.numerics.quotient import STEPS
from ms_quant.plan.layer import LayerPlan, recorded_layer
from ms_quant.plan.plan import Plan
from ms_quant.quantization.activation_record import recorded_activation, unsmoothed_problem
from ms_quant.schemes.storage import SmoothingTarget
from ms_quant.verify.foreign import ForeignProof
from ms_quant.verify.provenance import UNKNOWN, not_proved
from ms_quant.verify.result import Findings, SourceFindings, Verification
from ms_quant.verify.source import SourceProof, Subject


def verify_checkpoint(
    directory: str | PathLike[str], source: str | PathLike[str] | None = None
) -> Verification:
    """Proves that a quantized checkpoint of any format is what its runtime expects.

    Args:
        directory: the checkpoint.
        source: the float checkpoint that it was made from. With it weights are made again where
            they can be; every float tensor, ``config.json`` and the tokenizer files are compared;
            and the output error of the quantized linears is measured.

    Returns:
        Verification, whose ``problems`` are empty when the checkpoint is right.

    Raises:
        MsQuantError: the checkpoint or the source cannot be read at all, or is of another kind.

    Examples:
        >>> import ms_quant
        >>> made = ms_quant.quantize_checkpoint("Qwen3-8B", "Qwen3-8B-W8A16", "W8A16")
        >>> found = ms_quant.verify_checkpoint("Qwen3-8B-W8A16", "Qwen3-8B")
        >>> found.verdict, found.problems
        ('right', ())
        >>> found.made_again == found.quantized
        True
    """
    directory, found = model_directory(Path(directory)), Findings()
    _verify(directory, None if source is None else Path(source), found)
    return found.of(directory)


def _verify(directory: Path, source: Path | None, findings: Findings) -> None:
    problems = findings.problems
    format, _ = check_kind(directory)
    original = None if source is None else open_float(model_directory(source))
    problems += _root_problems(directory, format.entry, findings.notes)
    if problems:
        return
    structure, found = read_structure(directory)
    problems += found
    if structure is None:
        return
    plan = structure.plan
    record = read_json(directory / RECORD, MAX_RECORD_BYTES) if is_ours(directory) else {}
    findings.quantized, findings.left_float = len(plan.quantized()), len(plan.float_linears())
    problems += structure.defects
    findings.notes += structure.notes
    problems += config_problems(directory, plan.dtype, format.entry, strict=is_ours(directory))
    if is_ours(directory):
        problems += record_problems(directory / RECORD, record, plan)
    if problems:
        return
    subject = Subject(QuantizedModel(directory), plan, record)
    for index in range(plan.config.num_blocks):
        for group in plan.groups(index):
            problems += _group_problems(subject, index, group)
        try:
            subject.model.cache_scales(index)
        except MsQuantError as error:
            problems.append(str(error))
    problems += [p for p in _float_problems(structure) if p not in problems]
    if not problems:
        findings.notes += quotient_notes(plan, structure.checkpoint)
    if plan.foreign:
        findings.not_proved += not_proved(directory, plan, original is not None)
    if original is None or problems:
        return
    compared = findings.comparison = SourceFindings()
    if not plan.foreign:
        problems += SourceProof(subject, original.checkpoint, original.config, compared).problems()
        return
    rotated = any("rotation" in note for note in [*structure.notes, *_recorded_notes(record)])
    proof = ForeignProof(subject.model, original.checkpoint, compared, rotated)
    problems += proof.problems()
    findings.not_proved += proof.unproved


def _recorded_notes(record: Mapping[str, Any]) -> list[str]:
    """What a converted checkpoint's record says of the one that it was made from."""
    inner = record.get("record")
    found = inner.get(PROVENANCE) if isinstance(inner, Mapping) else None
    notes = found.get("notes") if isinstance(found, Mapping) else None
    return [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []


def _root_problems(directory: Path, entry: str, notes: list[str]) -> Iterator[str]:
    yield from config_problems(directory, entry=entry, strict=is_ours(directory))
    if not is_ours(directory):
        path = directory / "config.json"
        notes += spelling_problems(own_config(read_json(path), str(path)), str(path))
    if is_ours(directory):
        yield from check_files(directory)
        yield from unlisted_problems(directory, notes)


def record_problems(path: Path, value: Mapping[str, Any], plan: Plan) -> Iterator[str]:
    """What the record says was done, against what the other files say."""
    record = value.get("record")
    if not isinstance(record, Mapping):
        yield f"{path}: record is {record!r:.80}, expected what was computed"
        return
    stated = plan.record()
    for key in ("dtype", "kv_cache", "float_caches", "format"):
        wanted = stated.get(key, None if "cache" in key else record.get(key))
        if record.get(key) != wanted:
            yield f"{path}: {key} is {record.get(key)!r:.80}, expected {wanted!r}"
    layers = [
        (layer, recorded_layer(record, str(id))) for id, layer in plan.layers.items() if layer
    ]
    layers[:0] = [(layer, record) for layer in plan.distinct[:1]]  # what the first group is
    found = (_layer_problems(entry, layer) for layer, entry in layers)
    yield from dict.fromkeys(f"{path}: {text}" for texts in found for text in texts)


def _layer_problems(entry: Mapping[str, Any], layer: LayerPlan) -> Iterator[str]:
    """What is wrong with the recorded scheme of a group, its algorithms and their options."""
    stated = layer.record()
    for key in ("scheme", "scheme_options", "scale_dtype", "fold"):
        if key in stated and entry.get(key) != stated[key]:
            yield f"{key} is {entry.get(key)!r:.80}, expected {stated[key]!r}"
            return
    algorithm, options = entry.get("algorithm"), entry.get("algorithm_options", {})
    if layer.foreign:
        if algorithm != UNKNOWN:
            yield f"algorithm is {short(algorithm)}, expected {UNKNOWN!r}: others made the numbers"
        return
    if not is_known(algorithm):
        known = ", ".join([PLAIN, *ALGORITHMS])
        yield f"algorithm is {algorithm!r:.80}, expected one of {known}"
        return
    parts = options.values() if isinstance(options, Mapping) else [None]
    if not all(isinstance(part, Mapping) for part in parts):
        yield f"algorithm_options is {options!r:.80}, expected options by algorithm"
        return
    settings = {f"{name}.{key}": v for name, chosen in options.items() for key, v in chosen.items()}
    try:
        algorithms = get_algorithms(str(algorithm), layer.scheme, settings)
    except MsQuantError as error:
        yield str(error)
        return
    if algorithms.name != algorithm:
        yield f"algorithm is {algorithm!r:.80}, expected {algorithms.name!r}"


def _group_problems(subject: Subject, index: int, group: LinearGroup) -> Iterator[str]:
    """What the linears of one group must have in common, and what the record says of it."""
    prefix, first = block_prefix(index), None
    for member in group.members:
        path = prefix + member
        try:
            linear = subject.model.linear(path)
        except MsQuantError as error:
            yield str(error)
            continue
        if linear is None or not isinstance(linear.activation, StaticActivation | PhasedActivation):
            continue
        static = linear.static
        if first is None:
            first = (path, static)
        elif static.offset != first[1].offset:
            yield f"{path}.input_offset: differs from that of {first[0]}, the runtime fuses them"
        elif not np.array_equal(static.input_scale, first[1].input_scale):
            yield f"{path}.input_scale: differs from that of {first[0]}, the runtime fuses them"
    if first is not None and not subject.plan.foreign:
        yield from _activation_problems(subject, GroupId(index, group.name), *first)


def _activation_problems(
    subject: Subject, group: GroupId, path: str, found: StaticActivation
) -> Iterator[str]:
    """The parameters of a group's input against the record."""
    name, layer = str(group), subject.plan.layers[group]
    assert layer is not None
    try:
        activation = recorded_activation(subject.record, name, path, found)
    except MsQuantError as error:
        yield str(error)
        return
    subject.activations[name] = activation
    inside = layer.storage.target is SmoothingTarget.INPUT_SCALE
    if not (inside and subject.has(name, "smooths")):
        block = subject.plan.config.block(group.block)
        steps = STEPS if norm_of(subject.plan, group.block, block.group(group.name)) else 0
        wrong = unsmoothed_problem(activation, subject.plan.dtype, f"{path}.input_scale", steps)
        if wrong:
            yield wrong


def _float_problems(structure: Structure) -> Iterator[str]:
    """Reads every float tensor, which refuses NaN and inf; scales must be positive too."""
    for name, tensor in structure.expected.items():
        if tensor.dtype.kind in "iu" or name not in structure.checkpoint:
            continue
        if structure.checkpoint.info(name).dtype.kind in "iu":
            continue  # bits of floats, which reading the linear has looked at
        wrong = 0
        try:
            for _, part in structure.checkpoint.float32_chunks(name):
                wrong += int(np.count_nonzero(part <= 0)) if name.endswith("_scale") else 0
        except MsQuantError as error:
            yield str(error)
            continue
        if wrong:
            yield f"{name}: {wrong} scales are not positive, expected all to be"
