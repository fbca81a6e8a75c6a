"""Proof of what ``compress`` and ``decompress`` made: it holds what its source holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import MsQuantError
from ms_quant.files.strict_json import read_json
from ms_quant.formats.companions import copy_problems
from ms_quant.job.output_directory import MAX_RECORD_BYTES, RECORD
from ms_quant.job.unlisted import is_read
from ms_quant.progress import StepProgress
from sparse_compress.codec.index import RECORD as INDEX_RECORD
from sparse_compress.msmodelslim.directory import ModelSlimDirectory
from sparse_compress.ranks.summary import COMMAND
from sparse_compress.verify.check_collector import collect_problems
from sparse_compress.verify.floats import Counts, count

PROOF = "proof"  # only ``run`` makes one


def rewriting(directory: Path) -> dict[str, Any] | None:
    """The record of a directory that ``compress`` or ``decompress`` made; None of any other."""
    path = directory / RECORD
    try:
        record = read_json(path, MAX_RECORD_BYTES).get("record") if path.exists() else None
    except MsQuantError:  # the check of the files says so
        return None if (directory / PROOF).is_dir() else {}
    return record if isinstance(record, dict) and COMMAND in record else None


def msmodelslim_problems(
    directory: Path,
    source: ModelSlimDirectory | None,
    progress: StepProgress,
    checked: Counts,
    workers: int,
) -> list[str]:
    """What is wrong with a directory's tensors, one line each; counts what was looked at."""
    model = ModelSlimDirectory(directory)
    problems = [] if source is None else collect_problems(_structure_problems, model, source)
    if problems:
        return problems
    names = model.restored_plans()
    for done, name in enumerate(names, 1):
        problems += collect_problems(_tensor_problems, model, source, name, checked, workers)
        progress("tensors", done / len(names))
    if source is not None:
        for name in sorted(filter(is_read, {*model.companions(), *source.companions()})):
            problems += copy_problems(directory / name, source.directory / name)
    return problems


def _structure_problems(model: ModelSlimDirectory, source: ModelSlimDirectory) -> Iterator[str]:
    """Where description, names, types and shapes are not those of the source, restored."""
    found, expected = model.restored(), source.restored()
    for key in sorted({*found, *expected}):
        if found.get(key) != expected.get(key):
            yield (
                f"{model.path}: {key} stands for {found.get(key)!r:.80}, expected "
                f"{expected.get(key)!r:.80} as {source.path} has it"
            )
    ours, theirs = model.restored_plans(), source.restored_plans()
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            yield (
                f"{model.directory}: tensor {name!r} is {_text(model, name)}, expected "
                f"{_text(source, name)} as {source.directory} has it"
            )


def _text(model: ModelSlimDirectory, name: str) -> str:
    plan = model.restored_plans().get(name)
    return "not there" if plan is None else f"{plan.dtype} {list(plan.shape)}"


def _tensor_problems(
    model: ModelSlimDirectory,
    source: ModelSlimDirectory | None,
    name: str,
    checked: Counts,
    workers: int,
) -> Iterator[str]:
    path, _, suffix = name.rpartition(".")
    coded = path in model.coded and suffix == "weight"
    if coded:
        weight = model.decode(path, workers)
        tiles = model.info(f"{path}.index").shape[0] // INDEX_RECORD
        count(checked, linears=1, tiles=tiles)
        for parameter in model.coded[path].parameters[:2]:
            shape = model.info(f"{path}.{parameter}").shape
            if shape != weight.shape[:1]:
                yield f"{path}.{parameter}: {list(shape)}, expected {len(weight)} values"
    if source is None:
        return
    count(checked, compared=1)
    whole = coded or (path in source.coded and suffix == "weight")
    if whole:
        ours = weight if coded else model.checkpoint.read(name)
        wrong = _different(ours, _weight(source, path, workers))
    else:
        pieces = (_pieces(one, name) for one in (model, source))
        wrong = sum(_different(*pair) for pair in zip(*pieces, strict=True))
    if wrong:
        yield f"{name}: {wrong} values differ from those of {source.directory}"


def _weight(model: ModelSlimDirectory, path: str, workers: int) -> np.ndarray:
    if path in model.coded:
        return model.decode(path, workers)
    return model.checkpoint.read(f"{path}.weight")


def _pieces(model: ModelSlimDirectory, name: str) -> Iterator[np.ndarray]:
    rows = model.rows(name)
    return iter([rows]) if isinstance(rows, np.ndarray) else rows


def _different(first: np.ndarray, second: np.ndarray) -> int:
    """How many values differ in their bits."""
    raw = np.dtype(f"u{first.dtype.itemsize}")
    return int(np.count_nonzero(first.view(raw) != second.view(raw)))
