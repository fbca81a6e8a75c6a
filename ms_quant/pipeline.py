"""From a float checkpoint to a quantized one: validate, work block by block, write."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant import __version__
from ms_quant.blocks import Progress, WeightTransform, quantize_data_free
from ms_quant.checkpoint import golden_stick
from ms_quant.checkpoint.atomic import FileRecord, free_space_check, sha256_file, write_json
from ms_quant.checkpoint.finish import OutputDirectory
from ms_quant.checkpoint.job import JobDirectory, environment
from ms_quant.checkpoint.reader import Checkpoint, check_model, fingerprint
from ms_quant.checkpoint.writer import TensorPlan, plan_shards, shard_names, write_file, write_index
from ms_quant.data import load_tokens
from ms_quant.errors import MsQuantError
from ms_quant.models.config import ModelConfig, load_config
from ms_quant.numerics.storage import DTYPES
from ms_quant.plan import Plan, make_plan

SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class QuantizeOptions:
    """What a user asks of ``ms-quant quantize``.

    Attributes:
        model: directory of the float checkpoint.
        output: directory to make.
        scheme: name of the scheme.
        algorithm: name of the algorithm.
        alpha: smoothing strength of ``smoothquant``.
        calib: calibration file; needed by static schemes.
        samples: how many windows of it to use.
        seq_len: tokens of a window.
        seed: seed of the choice of windows.
        exclude: glob patterns of linears that stay float, by whole fused groups.
        dtype: type of what stays float; None keeps the checkpoint's (bfloat16 for float32).
        shard_bytes: largest data size of an output file.
        job: job directory; None is OUTPUT.job.
        keep_job: leave the job directory when all is done.
        any_environment: resume under other versions, CPU or thread count.
    """

    model: Path
    output: Path
    scheme: str = "W8A8"
    algorithm: str = "minmax"
    alpha: float = 0.5
    calib: Path | None = None
    samples: int = 64
    seq_len: int = 256
    seed: int = 0
    exclude: Sequence[str] = ()
    dtype: str | None = None
    shard_bytes: int = SHARD_BYTES
    job: Path | None = None
    keep_job: bool = False
    any_environment: bool = False

    @property
    def job_directory(self) -> Path:
        return self.job or self.output.with_name(self.output.name + ".job")


@dataclass(frozen=True)
class Prepared:
    """A checked request: everything that can be refused has been."""

    plan: Plan
    checkpoint: Checkpoint
    tokens: np.ndarray | None
    record: dict[str, Any]


def prepare(options: QuantizeOptions, extra: Mapping[str, Any] | None = None) -> Prepared:
    """Checks a request against the model and the data, before any work.

    Args:
        options: the request.
        extra: further entries of the job record (what another command computes on top).

    Raises:
        MsQuantError: anything that would make the job fail later.
    """
    config = load_config(options.model)
    plan = make_plan(
        config,
        options.scheme,
        options.algorithm,
        alpha=options.alpha,
        dtype=output_dtype(config, options.dtype),
        exclude=options.exclude,
    )
    checkpoint = Checkpoint(options.model)
    check_model(checkpoint, config)
    record: dict[str, Any] = {
        "tool": f"ms-quant {__version__}",
        "scheme": plan.scheme.name,
        "algorithm": plan.algorithm,
        "dtype": plan.dtype.name,
        "exclude": list(options.exclude),
        "shard_bytes": options.shard_bytes,
        "source": fingerprint(checkpoint),
        **(extra or {}),
    }
    tokens = None
    if plan.scheme.needs_calibration:
        require_mindspore(f"scheme {plan.scheme.name} runs the model on calibration data")
        tokens = _calibration_tokens(options)
        if plan.algorithm == "smoothquant":
            record["alpha"] = plan.alpha
        record["calibration"] = {
            "samples": len(tokens),
            "seq_len": options.seq_len,
            "seed": options.seed,
            "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        }
        record["environment"] = environment()
    return Prepared(plan, checkpoint, tokens, record)


def output_dtype(config: ModelConfig, name: str | None) -> np.dtype:
    """The type of what stays float: as asked, else the model's, else bfloat16 for float32."""
    if name is None:
        name = "bfloat16" if config.dtype == "float32" else config.dtype
    if name not in ("bfloat16", "float16"):
        raise MsQuantError(f"dtype {name!r} is not supported, expected 'bfloat16' or 'float16'")
    return DTYPES[name]


def require_mindspore(why: str) -> None:
    """Raises one sentence with the command that installs MindSpore when it is missing."""
    if find_spec("mindspore") is None:
        raise MsQuantError(
            f"{why}, which needs MindSpore: pip install 'ms-quant[mindspore]' "
            "(or mindspore and 'numpy<2')"
        )


def _calibration_tokens(options: QuantizeOptions) -> np.ndarray:
    if options.calib is None:
        raise MsQuantError(
            f"scheme {options.scheme} needs calibration data, expected --calib FILE "
            "(text, .jsonl or .npz)"
        )
    return load_tokens(options.calib, options.model, options.samples, options.seq_len, options.seed)


def run_blocks(
    prepared: Prepared,
    job: JobDirectory,
    progress: Progress,
    transform: WeightTransform | None = None,
) -> None:
    """Finishes every block of a job."""
    if prepared.tokens is None:
        quantize_data_free(prepared.plan, prepared.checkpoint, job, progress)
    elif job.finished_blocks() < prepared.plan.config.num_layers:
        from ms_quant.calibration import calibrate

        calibrate(prepared.plan, prepared.checkpoint, prepared.tokens, job, progress, transform)


def quantize_checkpoint(
    options: QuantizeOptions,
    progress: Progress = lambda index, part: None,
    prepared: Prepared | None = None,
) -> dict[str, Any]:
    """Makes a golden-stick checkpoint, or goes on making it.

    Args:
        options: the request.
        progress: told how far each block is.
        prepared: the checked request, where the caller has it already.

    Returns:
        What was made, as JSON: output, scheme, bytes, quantized and float linears, and
        ``"finished_before"``, True when there was nothing left to do.

    Raises:
        MsQuantError: the request cannot be served; no output directory is left behind.
    """
    prepared = prepared or prepare(options)
    output = OutputDirectory(options.output, prepared.record, options.any_environment)
    if not output.finished:
        free_space_check(options.output.parent, needed_bytes(prepared))
        job = JobDirectory(options.job_directory, prepared.record, options.any_environment)
        run_blocks(prepared, job, progress)
        _write(prepared, job, output, options)
    if options.job_directory.is_dir() and not options.keep_job:
        JobDirectory(options.job_directory, prepared.record, True).remove()
    return summary(prepared.plan, options.output, output.finished)


def _write(
    prepared: Prepared, job: JobDirectory, output: OutputDirectory, options: QuantizeOptions
) -> None:
    plan, directory = prepared.plan, output.begin()
    shards = plan_shards(golden_stick.tensor_plans(plan), options.shard_bytes)
    names = shard_names(golden_stick.SHARD_PREFIX, len(shards))
    get = _tensor_getter(prepared, job)
    files = [
        _write_once(directory / name, shard, get) for name, shard in zip(names, shards, strict=True)
    ]
    total = sum(tensor.bytes for shard in shards for tensor in shard)
    files.append(write_index(directory, dict(zip(names, shards, strict=True)), total))
    config = golden_stick.model_config(plan.config.raw, plan.dtype)
    files.append(write_json(directory / "config.json", config))
    files.append(write_json(directory / golden_stick.DESCRIPTION, golden_stick.description(plan)))
    choices = {f"block {i}": job.notes(i) for i in range(plan.config.num_layers)}
    output.finish(files, options.model, {"chosen": choices})


def _write_once(
    path: Path, shard: list[TensorPlan], get: Callable[[str], np.ndarray]
) -> FileRecord:
    """A file that an interrupted run finished is kept; the job it came from is the same."""
    if path.exists():
        return FileRecord(path.name, path.stat().st_size, sha256_file(path))
    return write_file(path, shard, get)


def _tensor_getter(prepared: Prepared, job: JobDirectory) -> Callable[[str], np.ndarray]:
    plan, quantized = prepared.plan, set(prepared.plan.quantized())

    def get(name: str) -> np.ndarray:
        path, _, suffix = name.rpartition(".")
        if path in quantized and suffix != "bias":
            _, _, index, member = path.split(".", 3)
            return golden_stick.linear_tensor(plan, job.linear(int(index), member), suffix)
        return to_dtype(prepared.checkpoint.read_float32(name), plan.dtype, name)

    return get


def to_dtype(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Rounds a float tensor to the output's type; what does not fit is refused."""
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype)
    if not np.isfinite(rounded).all():
        raise MsQuantError(
            f"{name}: {np.abs(array).max():g} does not fit {dtype.name}, expected --dtype bfloat16"
        )
    return rounded


def output_bytes(plan: Plan) -> int:
    return sum(tensor.bytes for tensor in golden_stick.tensor_plans(plan))


def needed_bytes(prepared: Prepared) -> int:
    """Disk space of output, finished blocks and two sets of hidden states."""
    hidden = 0
    if prepared.tokens is not None:
        hidden = 2 * prepared.tokens.size * prepared.plan.config.hidden_size * 4
    return 2 * output_bytes(prepared.plan) + hidden


def summary(plan: Plan, output: Path, finished_before: bool) -> dict[str, Any]:
    return {
        "output": str(output),
        "scheme": plan.scheme.name,
        "algorithm": plan.algorithm,
        "dtype": plan.dtype.name,
        "tensor_bytes": output_bytes(plan),
        "quantized_linears": len(plan.quantized()),
        "float_linears": plan.float_linears(),
        "served_by": list(plan.scheme.served_by),
        "not_served_by": list(plan.scheme.not_served_by),
        "finished_before": finished_before,
    }
