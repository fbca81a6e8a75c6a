"""A float copy of a model that is stored as codes and scales, for what reads no such model.

Tensors that are float already keep their bytes; the others are decoded, in float32, and rounded to
the model's type once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.files.atomic import FileRecord, free_spaces_check, write_json
from ms_quant.files.companion_files import companion_files
from ms_quant.files.encoded import EncodedCheckpoint
from ms_quant.files.floats import round_chunks
from ms_quant.files.reader import IGNORED, Checkpoint, fingerprint
from ms_quant.files.writer import TensorPlan, plan_shards, shard_names, write_file, write_index
from ms_quant.formats.companions import model_config
from ms_quant.formats.float_model import HEAD, NO_HEAD, open_float
from ms_quant.job.output_directory import OutputDirectory
from ms_quant.models.config import ModelConfig
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.paths import check_output_path
from ms_quant.pipeline.result import Output
from ms_quant.progress import PartProgress, silent
from ms_quant.schemes.table import FLOAT_CACHE

FLOAT = "float"
PREFIX = "model"
METADATA = {"format": "pt"}  # which old versions of transformers ask for


def copy_as_float(
    directory: Path, output: Path, shard_bytes: int, progress: PartProgress | None = None
) -> Output:
    """Writes the float model that a directory stands for.

    Args:
        directory: a model whose weights are stored in FP8 or packed integers.
        output: directory to make.
        shard_bytes: largest output file.
        progress: told how much is written, 0 to 1.

    Raises:
        MsQuantError: nothing in it is encoded; a tensor is malformed, or has NaN codes or a
            scale that is no positive number; names the tensor. No output directory is left behind.
    """
    check_output_path(directory, output)
    config, checkpoint = open_float(directory)
    if not isinstance(checkpoint, EncodedCheckpoint) or not checkpoint.encodings:
        raise BadFileError(
            f"{directory}: its weights are float already, expected a model in FP8 or packed "
            "integers to make a float copy of"
        )
    dtype = DTYPES["bfloat16" if config.dtype == "float32" else config.dtype]
    tensors = [*_tensors(config, checkpoint, dtype)]
    record: dict[str, Any] = {
        "format": FLOAT,
        "dtype": dtype.name,
        "shard_bytes": shard_bytes,
        "source": fingerprint(checkpoint),
        **({"head": NO_HEAD} if config.no_head else {}),
    }
    made = OutputDirectory(output, record, copied=companion_files(directory))
    size = sum(tensor.bytes for tensor in tensors)
    finished = made.finished
    if not finished:
        free_spaces_check({made.partial: max(0, size - made.bytes_present())})
        with made.open_or_discard():
            files = _write(made, tensors, checkpoint, shard_bytes, progress or silent)
            files.append(write_json(made.partial / "config.json", model_config(config, dtype)))
            made.finish(files, directory, {})
    return Output(
        path=output,
        format=FLOAT,
        scheme="FLOAT",
        algorithm="",
        kv_cache=FLOAT_CACHE,
        dtype=dtype.name,
        tensor_bytes=size,
        quantized_linears=0,
        float_linears=(),
        served_by=(),
        not_served_by=(),
        finished_before=finished,
        report=(),
    )


def _tensors(
    config: ModelConfig, checkpoint: EncodedCheckpoint, dtype: np.dtype
) -> Iterator[TensorPlan]:
    """Every tensor of the model, in its order; a head that is the embedding once."""
    expected = config.parameter_shapes()
    others = set(checkpoint.names) - set(expected)
    others = {name for name in others if not name.endswith(IGNORED)} - {HEAD}
    for name in [*expected, *sorted(others)]:
        info = checkpoint.info(name)
        stored = dtype if checkpoint.is_coded(name) else info.dtype
        yield TensorPlan(config.stored_name(name), stored, info.shape, source=name)


def _write(
    made: OutputDirectory,
    tensors: list[TensorPlan],
    checkpoint: Checkpoint,
    shard_bytes: int,
    progress: PartProgress,
) -> list[FileRecord]:
    shards = plan_shards(tensors, shard_bytes)
    named = dict(zip(shard_names(PREFIX, len(shards)), shards, strict=True))
    done, total = 0, sum(tensor.bytes for tensor in tensors) or 1

    def make(tensor: TensorPlan) -> Iterator[np.ndarray]:
        nonlocal done
        done += tensor.bytes
        progress(done / total)
        return round_chunks(checkpoint, tensor.source, tensor.dtype)

    def write_shard(path: Path) -> FileRecord:
        return write_file(path, named[path.name], make, METADATA)

    files = [made.write_once(name, write_shard) for name in named]
    return [*files, write_index(made.partial, named, total)]
