"""A W8A8S or W16A16S directory of msModelSlim, compressed. Of the model only the types count."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.files.atomic import sha256_file
from ms_quant.files.reader import fingerprint
from ms_quant.files.writer import TensorPlan
from ms_quant.progress import StepProgress, silent
from sparse_compress.codec import CORES, TooLongError, compress_matrix
from sparse_compress.codec.fractal import tile_count
from sparse_compress.codec.index import RECORD as INDEX_RECORD
from sparse_compress.layouts.coding import CODED, PLAIN
from sparse_compress.layouts.msmodelslim import TARGET
from sparse_compress.msmodelslim import reshard
from sparse_compress.msmodelslim.directory import ModelSlimDirectory
from sparse_compress.msmodelslim.reshard import Division
from sparse_compress.msmodelslim.rewrite import Rewrite
from sparse_compress.msmodelslim.summary import CompressedDirectory, Rewritten, compressed_summary
from sparse_compress.ranks.staging import Arrays
from sparse_compress.ranks.summary import RankSummary, summary

INFO_BYTES = 40


@dataclass(frozen=True)
class Compression:
    """A checked request.

    Attributes:
        model: the directory to compress.
        left: path of a linear to the reason why it stays as it is, known from its shape.
        job: what will be made.
    """

    model: ModelSlimDirectory
    left: dict[str, str]
    job: Rewrite

    def plan(self) -> dict[str, Any]:
        """What ``--dry-run`` prints."""
        return {
            "output": str(self.job.output),
            "format": self.job.kind,
            "compressed": [path for path in self.model.plain if path not in self.left],
            "uncompressed": self.left,
            "output_bytes": self.job.most_bytes,
            "disk_bytes": self.job.most_bytes + self.job.part_bytes,
        }


def check(
    directory: Path,
    output: Path,
    workers: int = CORES,
    target: str = TARGET.name,
    tp: int = 1,
) -> Compression | Division:
    """Checks a request before any work.

    Args:
        directory: the directory to compress.
        output: the directory to make.
        workers: how many threads code a weight.
        target: whom it is for.
        tp: how many ranks to write.

    Raises:
        MsQuantError: the directory is malformed, is compressed, or holds nothing to compress; or
            the output cannot be made, or the target cannot hold it.
    """
    if target != TARGET.name:
        return reshard.check(directory, output, target, tp, workers)
    if tp != 1:
        raise BadFileError(f"target {target} is not split over ranks, tp is {tp}, expected 1")
    model = ModelSlimDirectory(directory)
    if model.coded:
        raise BadFileError(f"{model.path}: {next(iter(model.coded))}.weight is compressed already")
    if not model.plain:
        raise BadFileError(f"{model.path}: names no weight of type {' or '.join(PLAIN)}")
    shapes = {path: model.info(f"{path}.weight").shape for path in model.plain}
    reasons = {path: coding.reason(shapes[path]) for path, coding in model.plain.items()}
    left = {path: reason for path, reason in reasons.items() if reason}
    if len(left) == len(reasons):
        raise _nothing(model, left)
    paths = [path for path in model.plain if path not in left]
    weights = {f"{path}.weight" for path in paths}
    kept = (name for name in model.checkpoint.names if name not in weights)
    infos = {name: model.info(name) for name in kept}
    job = Rewrite(
        command="compress",
        source=model.directory,
        output=Path(output),
        kind=model.kind(CODED),
        versioned=model.versioned,
        sharded=False,
        made_from={
            "source": fingerprint(model.checkpoint),
            "description_sha256": sha256_file(model.path),
        },
        parts=[partial(_part, model, path, workers) for path in paths],
        kept={
            name: (TensorPlan(name, info.dtype, info.shape), partial(model.rows, name))
            for name, info in infos.items()
        },
        describe=partial(_describe, model, paths),
        part_bytes=sum(_most_bytes(model, path) for path in paths),
        companions=model.companions(),
        metadata=model.metadata,
    )
    job.directory()  # refuses a place that is taken
    return Compression(model, left, job)


def compress(
    request: Compression | Division, progress: StepProgress = silent
) -> Rewritten[RankSummary] | Rewritten[CompressedDirectory]:
    """Compresses a directory, or goes on with it.

    Args:
        request: what :func:`check` made of the directory.
        progress: told how far the step ``"compress"`` is.

    Returns:
        Rewritten: what was made.

    Raises:
        MsQuantError: the directory cannot be compressed; no output is left behind.
    """
    if isinstance(request, Division):
        done = request.run(progress)
        return Rewritten(summary(request.output), done, tuple(request.not_served_by))
    done = request.job.run(progress)
    return Rewritten(compressed_summary(ModelSlimDirectory(request.job.output)), done)


def _part(model: ModelSlimDirectory, path: str, workers: int) -> Arrays:
    """A weight, compressed where that pays."""
    name = f"{path}.weight"
    weight = model.checkpoint.read(name)
    try:
        mode = model.plain[path].mode
        coded = compress_matrix(weight.view(np.int8), mode, threads=workers)
    except TooLongError:
        return {name: weight}
    return {name: coded.weight, f"{path}.index": coded.index, f"{path}.info": coded.info}


def _describe(model: ModelSlimDirectory, paths: list[str], names: set[str]) -> dict[str, Any]:
    compressed = {path for path in paths if f"{path}.index" in names}
    if not compressed:
        shapes = {path: model.info(f"{path}.weight").shape for path in paths}
        raise _nothing(model, {path: model.plain[path].left(shapes[path]) for path in paths})
    return model.compressed(compressed)


def _nothing(model: ModelSlimDirectory, left: dict[str, str]) -> MsQuantError:
    path, reason = next(iter(left.items()))
    return BadFileError(
        f"{model.directory}: none of {len(model.plain)} weights can be compressed; {path}: {reason}"
    )


def _most_bytes(model: ModelSlimDirectory, path: str) -> int:
    coding, (n, k) = model.plain[path], model.info(f"{path}.weight").shape
    tiles = tile_count(n, k * coding.dtype.itemsize)
    return coding.most_bytes((n, k)) + INDEX_RECORD * tiles + INFO_BYTES
