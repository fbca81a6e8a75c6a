"""Proof that a W8A8SC checkpoint is what its runtime expects, and what its source says.

Nothing is run. Files are compared with their digests, structure with the model, every tile is
decoded; with the source, every int8 weight is made again and compared bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.algorithms import has
from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.files.reader import Checkpoint, FloatTensors
from ms_quant.files.strict_json import read_json
from ms_quant.formats.companions import config_problems, source_problems
from ms_quant.formats.float_model import open_float
from ms_quant.formats.source_kind import model_directory
from ms_quant.formats.structure import check_kind
from ms_quant.job.output_directory import MAX_RECORD_BYTES, RECORD, check_files
from ms_quant.job.unlisted import unlisted_problems
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.config import ModelConfig, load_config
from ms_quant.models.names import block_prefix
from ms_quant.numerics.linear import QuantizedLinear, bias_units, int8_linear
from ms_quant.progress import StepProgress, silent
from ms_quant.quantization.divided import as_divided
from ms_quant.statistics import activation_range
from ms_quant.verify.requantize import Comparison, ScaleRule
from sparse_compress.codec import CORES
from sparse_compress.codec.fractal import tile_count
from sparse_compress.layouts import (
    TARGETS,
)
from sparse_compress.layouts.fp16 import FLOAT16
from sparse_compress.layouts.partition import fused_shape
from sparse_compress.msmodelslim.directory import ModelSlimDirectory
from sparse_compress.msmodelslim.reshard import ModelSlimModel
from sparse_compress.ranks.proof import Proof, compressed_groups, weight_error
from sparse_compress.ranks.reader import SparseModel
from sparse_compress.ranks.tensors import description_problems, open_ranks, structure_problems
from sparse_compress.rate.prune import pruned_count
from sparse_compress.verify.check_collector import collect_problems
from sparse_compress.verify.floats import Counts, count, float_problems, stored_floats
from sparse_compress.verify.msmodelslim import msmodelslim_problems, rewriting
from sparse_compress.verify.record import read_record, recorded_layout, recorded_pruning
from sparse_compress.verify.reshard import resharded_problems
from sparse_compress.verify.result import SparseVerification

ERROR_DIGITS = 1e-9


@dataclass
class Subject:
    """What is being verified.

    Attributes:
        directory: the checkpoint.
        model: its reader.
        record: what it says it was made with.
        source: the source checkpoint, as it was quantized, where it is given.
        checked: counts of what was looked at.
    """

    directory: Path
    model: SparseModel
    record: dict[str, Any]
    source: FloatTensors | None
    checked: Counts


def verify(
    directory: Path,
    source: Path | None = None,
    progress: StepProgress = silent,
    workers: int = CORES,
) -> SparseVerification:
    """Checks a W8A8SC checkpoint.

    Args:
        directory: the checkpoint.
        source: the checkpoint it was made from: a float one, or for what ``compress`` and
            ``decompress`` made, a directory of msModelSlim, compressed or not.
        progress: told how far the steps ``"files"`` and ``"tensors"`` are.
        workers: how many threads decode a linear.

    Returns:
        SparseVerification: what was found.

    Raises:
        MsQuantError: the directory is no such checkpoint at all, or the source cannot be read.
    """
    directory = model_directory(directory)
    record, checked = rewriting(directory), dict[str, int]()
    if record is None:
        _require_checkpoint(directory)
    contents, opened = _check_of(record)
    original = None if source is None else opened(model_directory(source))
    progress("files", 0.0)
    notes: list[str] = []
    problems = [
        *collect_problems(check_files, directory),
        *collect_problems(unlisted_problems, directory, notes),
    ]
    progress("files", 1.0)
    problems += collect_problems(
        partial(
            contents,
            directory,
            source=original,
            progress=progress,
            checked=checked,
            workers=workers,
        )
    )
    return SparseVerification(directory, source, tuple(problems), tuple(notes), checked)


def _check_of(
    record: dict[str, Any] | None,
) -> tuple[Callable[..., list[str]], Callable[[Path], Any]]:
    """The check of a checkpoint's content, by who made it, and what opens its source."""
    if record is None:
        return _contents, lambda source: open_float(model_directory(source)).checkpoint
    if "target" in record:
        return partial(resharded_problems, record=record), ModelSlimModel
    return msmodelslim_problems, ModelSlimDirectory


def _require_checkpoint(directory: Path) -> None:
    described = any((directory / target.description).exists() for target in TARGETS.values())
    title = _other_kind(directory)
    if title:
        raise BadFileError(
            f"{directory}: is {title}, expected a W8A8SC checkpoint; ms-quant verify proves it"
        )
    if not described and not (directory / RECORD).exists():
        names = " or ".join(sorted({target.description for target in TARGETS.values()}))
        raise BadFileError(f"{directory}: is no W8A8SC checkpoint, expected {names}, and {RECORD}")


def _other_kind(directory: Path) -> str:
    """What a checkpoint of ms-quant's own formats is called; empty for all else."""
    try:
        return check_kind(directory)[0].title
    except MsQuantError:
        return ""


def _contents(
    directory: Path,
    source: Checkpoint | None,
    progress: StepProgress,
    checked: dict[str, int],
    workers: int,
) -> list[str]:
    record, config = read_record(directory), load_config(directory)
    original = None if source is None else _divided(source, config, directory)
    layout = recorded_layout(directory, config, record)
    ranks = open_ranks(directory, layout.target, layout.tp)
    problems = structure_problems(layout, ranks) + collect_problems(
        _config_problems, directory, source
    )
    if problems:
        return problems
    problems += collect_problems(description_problems, directory, layout, ranks)
    model = SparseModel(directory, layout, ranks, workers)
    subject = Subject(directory, model, record, original, checked)
    for index in range(config.num_layers):
        problems += collect_problems(_block_problems, subject, index)
        progress("tensors", (index + 1) / (config.num_layers + 1))
    for name in stored_floats(model):
        problems += collect_problems(float_problems, model, original, name, checked)
    progress("tensors", 1.0)
    return problems


def _divided(source: Checkpoint, config: ModelConfig, directory: Path) -> FloatTensors:
    """The source as its activations were brought into the range of float16."""
    path = directory / RECORD
    entries = read_json(path, MAX_RECORD_BYTES).get(activation_range.KEY)
    return as_divided(source, config, entries, f"{path}: {activation_range.KEY}")


def _config_problems(directory: Path, source: Checkpoint | None) -> Iterator[str]:
    yield from config_problems(directory, FLOAT16)
    if source is not None:
        yield from source_problems(directory, source.directory, FLOAT16)


def _block_problems(subject: Subject, index: int) -> Iterator[str]:
    """The compressed linears of one block."""
    layout = subject.model.layout
    proof = Proof(subject.directory, layout, index)
    for group in compressed_groups(layout, index):
        yield from collect_problems(_group_problems, subject, proof, index, group)


def _group_problems(
    subject: Subject, proof: Proof, index: int, group: LinearGroup
) -> Iterator[str]:
    fused = f"{block_prefix(index)}{group.fused}"
    linears = subject.model.group(index, group)
    layout = subject.model.layout
    tiles = tile_count(*fused_shape(group, layout.tp)) * layout.tp
    count(subject.checked, linears=len(linears), tiles=tiles)
    proof.norm(group)
    pruning = recorded_pruning(subject.record)
    problem = proof.problem(group, linears)
    if problem:
        yield f"{fused}: {problem}"
    for member, linear in linears.items():
        name = f"{block_prefix(index)}{member}"
        least = pruned_count(pruning.share, linear.weight.size) if pruning else 0
        zeros = linear.weight.size - int(np.count_nonzero(linear.weight))
        if zeros < least:
            yield (
                f"{name}.weight: {zeros} zeros of {linear.weight.size}, expected at least {least} "
                f"at sparsity {pruning.share if pruning else 0}"
            )
        if subject.source is not None:
            yield from _source_problems(subject, proof, name, group, member, linear)
        stated = proof.counts().get(member, {}).get("zeros")
        if stated != zeros:
            yield f"{proof.file.path}: states {stated} zeros of {name}.weight, expected {zeros}"


def _source_problems(
    subject: Subject,
    proof: Proof,
    name: str,
    group: LinearGroup,
    member: str,
    linear: QuantizedLinear,
) -> Iterator[str]:
    """Makes an int8 weight again from the source and compares every value.

    What was rounded for a goal depends on all calibration data: there its distance from the source
    is measured again.
    """
    assert subject.source is not None
    source, record = subject.source.read_float32(f"{name}.weight"), subject.record
    pruning = recorded_pruning(record)
    stored = int8_linear(linear.weight, proof.weight_scale(member), linear.bias, linear.activation)
    if pruning is None:
        count(subject.checked, measured=1)
        stated = proof.error(member)
        found = weight_error(source, replace(stored, activation=proof.activation(group)))
        if not math.isclose(found, stated, rel_tol=ERROR_DIGITS, abs_tol=1e-24):
            yield (
                f"{name}.weight: its relative squared error from the source is {found:.6g}, "
                f"expected {stated:.6g} as {proof.file.path} states"
            )
    else:
        count(subject.checked, recomputed=1)
        comparison, smoothed = Comparison(), proof.smoothed(group, source, pruning)
        comparison.add(0, smoothed, stored, ScaleRule(has(record["algorithm"], "clips")))
        yield from comparison.problems(name, "weight_scale", source.shape)
    if linear.bias is not None and subject.model.layout.target.folds_bias:
        bias = subject.source.read_float32(f"{name}.bias")
        expected = bias_units(bias, linear.deq_scale) * linear.deq_scale
        wrong = int(np.count_nonzero(linear.bias != expected.astype(np.float32)))
        if wrong:
            yield f"{name}.quant_bias: {wrong} of {bias.size} values do not hold the source's bias"
