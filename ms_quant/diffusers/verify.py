"""Proof that a quantized directory of diffusers holds what vllm-omni reads, and what its source is.

Nothing is run. With the source, every linear is made again and compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ms_quant.diffusers.component import ENTRY, open_float_component
from ms_quant.diffusers.directory import DiffusersDirectory, open_directory
from ms_quant.diffusers.methods import ASCEND, E2M1_IN_E4M3, Storage
from ms_quant.diffusers.plan import Choice, ComponentPlan, Values, plan_component
from ms_quant.diffusers.stored import Stored, read_stored
from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.files.atomic import sha256_file
from ms_quant.files.writer import Array, TensorPlan
from ms_quant.formats.ascend.codes import codes_of, no_nan
from ms_quant.job.output_directory import RECORD, check_files
from ms_quant.job.unlisted import unlisted
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.verify.result import ComparedLinear, Findings, SourceFindings, Verification

ROWS = 1 << 19
"""Values of a weight whose error is looked at, at a time."""
NO_EXPONENT = 255


def verify_directory(path: Path, source: Path | None = None) -> Verification:
    """Proves a quantized directory of diffusers.

    Args:
        path: the directory.
        source: the float one that it was made from.

    Raises:
        MsQuantError: one of them cannot be read at all, or is of another kind.
    """
    findings = Findings()
    original = None if source is None else open_directory(source)
    stored = read_stored(path)
    findings.quantized = sum(len(plan.linears) for plan in stored.plans.values())
    findings.left_float = sum(len(plan.floats) for plan in stored.plans.values())
    findings.problems += _record_problems(stored, findings)
    findings.problems += stored.problems
    if not findings.problems:
        for plan in stored.plans.values():
            findings.problems += _value_problems(plan)
    if original is not None and not findings.problems:
        if not stored.record:
            findings.not_proved.append("how its numbers were made: there is no ms_quant.json")
        else:
            findings.comparison = SourceFindings()
            problems = _source_problems(stored, original, findings.comparison)
            findings.problems += problems
    return findings.of(stored.directory.path)


def _record_problems(stored: Stored, findings: Findings) -> Iterator[str]:
    directory = stored.directory.path
    if not stored.record:
        findings.not_proved.append("that its files are whole: there is no ms_quant.json")
        return
    yield from check_files(directory)
    asked, method = stored.asked, stored.method
    if asked.get("method") != method:
        yield f"{directory / RECORD}: method is {asked.get('method')!r}, expected {method!r}"
    components = {name.partition("/")[0] for name in stored.record.get("files", {}) if "/" in name}
    found = unlisted(directory)
    for name in sorted({*found.loaded, *found.settings, *found.others}):
        if name.partition("/")[0] in components or name in (*found.loaded, *found.settings):
            yield (
                f"{directory / name}: not listed in {RECORD}, expected no other file that a "
                "runtime reads"
            )
        else:
            findings.notes.append(f"{directory / name} is not listed in {RECORD}")
    for plan in stored.plans.values():
        if plan.component.config[ENTRY] != plan.entry():
            yield f"{plan.component.config_path}: {ENTRY} differs from what the tensors say"


def _value_problems(plan: ComponentPlan) -> Iterator[str]:
    """Codes that are none, scales that are not positive, floats that are not finite."""
    checkpoint = plan.component.checkpoint
    for tensor in plan.tensors:
        try:
            if tensor.part is None or tensor.dtype.kind == "f":
                _check_floats(plan, tensor)
            elif tensor.part[1] == "weight":
                check_codes(checkpoint.read(tensor.name), plan.storage, tensor)
            else:
                wrong = int(np.count_nonzero(checkpoint.read(tensor.name) == NO_EXPONENT))
                if wrong:
                    raise BadFileError(f"{tensor.name}: {wrong} exponents are NaN, expected none")
        except MsQuantError as error:
            yield str(error)


def check_codes(stored: np.ndarray, storage: Storage, tensor: TensorPlan) -> None:
    """Refuses what stands for no number.

    Raises:
        MsQuantError: names the weight.
    """
    if storage.method.name == ASCEND:
        scheme = storage.layer.scheme
        codes = codes_of(scheme, storage.layer.dtype)
        codes.unpack(stored, stored.shape[1] * codes.columns, tensor.name)
        return
    no_nan(stored, stored.shape[1], tensor.name)
    if storage.weight.bits == 4:
        known = np.zeros(256, bool)
        known[E2M1_IN_E4M3] = True
        wrong = int(np.count_nonzero(~known[stored.view(np.uint8)]))
        if wrong:
            raise BadFileError(
                f"{tensor.name}: {wrong} of {stored.size} values are none of float4 e2m1, expected "
                "all to be"
            )


def _check_floats(plan: ComponentPlan, tensor: TensorPlan) -> None:
    scale = tensor.part is not None and tensor.part[1].endswith("scale")
    for _, chunk in plan.component.checkpoint.float_chunks(tensor.name):
        wrong = int(np.count_nonzero(chunk <= 0)) if scale else 0
        if wrong:
            raise BadFileError(f"{tensor.name}: {wrong} scales are not positive, expected all")


def _source_problems(
    stored: Stored, original: DiffusersDirectory, found: SourceFindings
) -> Iterator[str]:
    if original.transformers != stored.directory.transformers:
        yield (
            f"{original.path}: has {', '.join(original.transformers) or 'one transformer alone'}, "
            f"expected {', '.join(stored.directory.transformers) or 'one transformer alone'}"
        )
        return
    for name in original.copied:
        path, ours = original.path / name, stored.directory.path / name
        if not ours.is_file() or sha256_file(path) != sha256_file(ours):
            yield f"{ours}: differs from {path}, expected the same bytes"
    asked = stored.asked
    dtype = DTYPES.get(str(asked.get("dtype")))
    choice = Choice(tuple(asked.get("exclude", ())), bool(asked.get("float_undivided")), dtype)
    for name, plan in stored.plans.items():
        component = open_float_component(original.path / name, name)
        made = plan_component(component, plan.storage, choice)
        if {**component.config, ENTRY: made.entry()} != plan.component.config:
            yield f"{plan.component.config_path}: differs from what {component.directory} gives"
        yield from _compare(plan, made, found)


def _compare(plan: ComponentPlan, made: ComponentPlan, found: SourceFindings) -> Iterator[str]:
    values, checkpoint = Values(made), plan.component.checkpoint
    names = {tensor.name for tensor in made.tensors}
    for name in sorted(names ^ {tensor.name for tensor in plan.tensors}):
        yield f"{plan.component.directory}: {name} is only in one of it and what is made again"
        return
    differ: dict[str, bool] = {}
    for tensor in made.tensors:
        wrong = _differing(checkpoint.read(tensor.name), values(tensor), tensor)
        if tensor.part is not None:
            path = tensor.part[0]
            if path not in differ:
                error = weight_error(values.linear(path), made, path)
                found.layers.append(ComparedLinear(path, error, True))
            differ[path] = differ.get(path, False) or bool(wrong)
        if wrong:
            yield wrong
    found.layers[:] = [
        ComparedLinear(x.layer, x.output_error, not differ.get(x.layer, False))
        for x in found.layers
    ]


def _differing(stored: np.ndarray, value: Array, tensor: TensorPlan) -> str:
    pieces = [value] if isinstance(value, np.ndarray) else value
    start = 0
    for piece in pieces:
        part = stored[start : start + len(piece)]
        ours, theirs = (np.ascontiguousarray(x).view(np.uint8) for x in (part, piece))
        if part.dtype != piece.dtype or ours.shape != theirs.shape:
            return f"{tensor.name}: {part.dtype}, expected {piece.dtype}"
        if not np.array_equal(ours, theirs):
            count = int(np.count_nonzero(ours != theirs))
            row = start + int(np.argwhere(ours != theirs)[0][0])
            return (
                f"{tensor.name}: {count} bytes differ from what the source gives, expected none; "
                f"the first is in row {row}"
            )
        start += len(piece)
    return ""


def weight_error(linear: QuantizedLinear, plan: ComponentPlan, path: str) -> float:
    """Squared error of a weight over its square: of the output, for channels of one variance."""
    format, arrays = plan.storage.weight, linear.grid.arrays()
    step, codes = max(1, ROWS // linear.weight.shape[1]), linear.weight
    wrong = square = 0.0
    for start in range(0, len(codes), step):
        rows = slice(start, min(start + step, len(codes)))
        grid = format.grid({key: value[rows] for key, value in arrays.items()})
        chunks = plan.component.checkpoint.float_chunks(f"{path}.weight", rows)
        weight = np.concatenate([chunk for _, chunk in chunks]).astype(np.float32)
        wrong += float(np.square(weight - grid.values(codes[rows]), dtype=np.float64).sum())
        square += float(np.square(weight, dtype=np.float64).sum())
    return wrong / square if square else 0.0
