"""The quantized checkpoint that a compressed one was made from, in the files of msModelSlim."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.files.atomic import sha256_file
from ms_quant.files.digest import shard_print
from ms_quant.files.reader import fingerprint
from ms_quant.files.writer import TensorPlan
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.names import block_prefix
from ms_quant.numerics.linear import folded_bias
from ms_quant.progress import StepProgress, silent
from sparse_compress.codec import CORES
from sparse_compress.layouts import EMBEDDING, HEAD, find_target
from sparse_compress.layouts.coding import PARAMETERS, PLAIN
from sparse_compress.layouts.fp16 import FLOAT16
from sparse_compress.layouts.msmodelslim import TARGET
from sparse_compress.layouts.typed import FLOAT, KIND_KEY, PARAMETER
from sparse_compress.msmodelslim.directory import ModelSlimDirectory
from sparse_compress.msmodelslim.files import companions
from sparse_compress.msmodelslim.rewrite import Rewrite
from sparse_compress.msmodelslim.summary import PlainDirectory, Rewritten, plain_summary
from sparse_compress.ranks.pack import deq_bits
from sparse_compress.ranks.reader import SparseModel
from sparse_compress.ranks.staging import Arrays, Tensors
from sparse_compress.ranks.summary import open_sparse


def check(directory: Path, output: Path, workers: int = CORES) -> Rewrite:
    """Checks a checkpoint before any work.

    Args:
        directory: a checkpoint of any target, or a compressed directory of msModelSlim.
        output: the directory to make.
        workers: how many threads decode a weight.

    Raises:
        MsQuantError: a file is malformed, a smoothing vector has no place in the output, or the
            output cannot be made.
    """
    directory, output = Path(directory), Path(output)
    job = _whole(directory, output, workers) or _ranks(directory, output, workers)
    job.directory()  # refuses a place that is taken
    return job


def decompress(request: Rewrite, progress: StepProgress = silent) -> Rewritten[PlainDirectory]:
    """Restores the quantized checkpoint, or goes on with it.

    Args:
        request: what :func:`check` made of the checkpoint.
        progress: told how far the step ``"decompress"`` is.

    Returns:
        Rewritten: what was made.

    Raises:
        MsQuantError: a tile cannot be decoded; no output is left behind.
    """
    finished_before = request.run(progress)
    return Rewritten(plain_summary(ModelSlimDirectory(request.output)), finished_before)


def _whole(directory: Path, output: Path, workers: int) -> Rewrite | None:
    """The job for a directory of msModelSlim, that of ``run`` included; None for ranks."""
    target = find_target(directory)
    if target not in (None, TARGET):
        return None
    model = ModelSlimDirectory(directory)
    if not model.coded:
        raise BadFileError(f"{model.path}: names no compressed weight, expected some")
    weights = {f"{path}.weight": path for path in model.coded}
    plans = model.restored_plans()
    return Rewrite(
        command="decompress",
        source=directory,
        output=output,
        kind=model.kind(PLAIN),
        versioned=model.versioned,
        sharded=model.versioned,
        made_from={
            "source": fingerprint(model.checkpoint),
            "description_sha256": sha256_file(model.path),
        },
        parts=[
            partial(lambda name, path: {name: model.decode(path, workers)}, name, path)
            for name, path in weights.items()
        ],
        kept={
            name: (plan, partial(model.rows, name))
            for name, plan in plans.items()
            if name not in weights
        },
        describe=lambda names: model.restored(),
        part_bytes=sum(plans[name].bytes for name in weights),
        companions=model.companions(),
        metadata=model.metadata,
    )


def _ranks(directory: Path, output: Path, workers: int) -> Rewrite:
    """The job for a checkpoint that is split over ranks."""
    model = open_sparse(directory, workers)
    groups = [
        (index, group, fused)
        for index, group, fused in model.layout.linears()
        if fused in model.layout.compressed
    ]
    for _, _, fused in groups:
        _check_one_scale(model, fused)
    paths = {f"{block_prefix(i)}{member}" for i, group, _ in groups for member in group.members}
    sizes = (
        model.config.block(index).linears[member].shape
        for index, group, _ in groups
        for member in group.members
    )
    files = [file for rank in model.ranks for file in rank.files]
    prints = {file.path.relative_to(directory).as_posix(): shard_print(file) for file in files}
    return Rewrite(
        command="decompress",
        source=directory,
        output=output,
        kind=PARAMETER,
        versioned=False,
        sharded=False,
        made_from={
            "source": {
                "config_sha256": sha256_file(directory / "config.json"),
                "shards": prints,
            },
            "description_sha256": sha256_file(directory / model.layout.target.description),
        },
        parts=[partial(_group, model, index, group) for index, group, _ in groups],
        kept=_floats(model, paths),
        describe=partial(_describe, paths),
        part_bytes=sum(n * k + (8 + 4) * n + 4 for n, k in sizes),
        companions=companions(directory),
    )


def _check_one_scale(model: SparseModel, fused: str) -> None:
    """Refuses a smoothing vector, for which one ``input_scale`` has no place."""
    name = f"{fused}.input_scale"
    first = model.ranks[0].read(name)[0]
    if any((rank.read(name) != first).any() for rank in model.ranks):
        raise BadFileError(
            f"{model.directory}: {name} differs between channels, as smoothing makes it; expected "
            "one value, as a W8A8S directory holds"
        )


def _group(model: SparseModel, index: int, group: LinearGroup) -> Arrays:
    """The int8 linears of a group, merged from the ranks."""
    arrays: Arrays = {}
    for member, linear in model.group(index, group).items():
        path, activation = f"{block_prefix(index)}{member}", linear.static
        values = (
            deq_bits(linear.deq_scale),
            folded_bias(linear, path),
            activation.input_scale[:1].astype(FLOAT16),
            np.array([activation.offset], TARGET.offset_dtype),
        )
        arrays[f"{path}.weight"] = linear.weight
        arrays.update(
            (f"{path}.{suffix}", value) for suffix, value in zip(PARAMETERS, values, strict=True)
        )
    return arrays


def _floats(model: SparseModel, quantized: set[str]) -> Tensors:
    """What is float16 and no bias of a quantized linear; a tied head is there twice."""
    shapes = model.config.parameter_shapes()
    shapes[HEAD] = shapes[EMBEDDING]
    names = dict.fromkeys([*model.layout.float_names(), HEAD])
    return {
        name: (
            TensorPlan(name, FLOAT16, shapes[name]),
            partial(lambda name: (rows for _, rows in model.float16_chunks(name)), name),
        )
        for name in names
        if name.rpartition(".")[0] not in quantized
    }


def _describe(quantized: set[str], names: set[str]) -> dict[str, Any]:
    types = {
        name: PARAMETER if name.rpartition(".")[0] in quantized else FLOAT for name in sorted(names)
    }
    return {KIND_KEY: PARAMETER, **types}
