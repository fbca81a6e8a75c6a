"""Checking what ``ms-quant quantize`` is asked: every refusal that needs no work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant import __version__
from ms_quant.errors import BadArgumentError, UnsupportedError
from ms_quant.files.companion_files import companion_files
from ms_quant.files.floats import check_fits
from ms_quant.files.reader import Checkpoint, FloatTensors, fingerprint
from ms_quant.formats.float_model import NO_HEAD, FloatCheckpoint, model_notes, open_float
from ms_quant.formats.float_types import router_dtype
from ms_quant.formats.registry import FORMATS
from ms_quant.formats.source_kind import model_directory
from ms_quant.formats.tensor_parallel import rank_notes, refuse_ranks
from ms_quant.job.directory import JobDirectory, environment
from ms_quant.job.output_directory import OutputDirectory
from ms_quant.job.unlisted import is_read
from ms_quant.models.config import ModelConfig
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.best import with_best
from ms_quant.pipeline.calibration import data_notes, data_record
from ms_quant.pipeline.options import CALIB_DIRECTORY, QuantizeOptions
from ms_quant.pipeline.parts import by_part
from ms_quant.pipeline.paths import check_paths, check_space, job_bytes
from ms_quant.pipeline.plan_notes import plan_notes
from ms_quant.pipeline.planning import make_plan, plan_of_recipe, recipe_notes
from ms_quant.pipeline.writer import output_bytes
from ms_quant.plan.plan import Plan
from ms_quant.quantization.rotated import RotatedCheckpoint
from ms_quant.recipe import Recipe
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.table import FLOAT_CACHE

Opened = Callable[[Path], FloatCheckpoint]
"""Opens a float model; the same one is opened once."""
REST = "rest"
"""In records, the parts of a model that were not named."""
SHARED = ("source", "environment", "calibration", "exclude")


@dataclass(frozen=True)
class Extension:
    """What another command adds to a request.

    Attributes:
        numbers: entries of the job record: what it does to the numbers.
        writing: entries of the output's record that only concern how it is written.
        output_bytes: most bytes of the output's tensors.
        unknown: entries of the job record that only work will tell.
    """

    numbers: Mapping[str, Any] = field(default_factory=dict)
    writing: Mapping[str, Any] = field(default_factory=dict)
    output_bytes: int = 0
    unknown: Sequence[str] = ()


@dataclass(frozen=True)
class CheckedJob:
    """A checked request: everything that can be refused has been.

    Attributes:
        options: what was asked.
        plan: what to do to which linear.
        checkpoint: the float model.
        tensors: the same, or as it is rotated.
        tokens: int32 (windows, tokens) calibration data, or None.
        record: what changes numbers; a job with the same goes on.
        output_record: that, and how the output is written.
        output_bytes: most bytes of the output's tensors.
        unknown: entries that the record does not have yet.
        others: the requests for other formats that the same job serves.
        companions: paths of files that go with the tensors.
        notes: what to know before the work, one sentence each.
    """

    options: QuantizeOptions
    plan: Plan
    checkpoint: Checkpoint
    tensors: FloatTensors
    tokens: np.ndarray | None
    record: dict[str, Any]
    output_record: dict[str, Any]
    output_bytes: int
    unknown: Sequence[str] = ()
    others: tuple[CheckedJob, ...] = ()
    companions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[CheckedJob, ...]:
        """This one and the others."""
        return self, *self.others

    def output(self) -> OutputDirectory:
        """The output as it is on the disk now."""
        options = self.options
        return OutputDirectory(
            options.output, self.output_record, options.any_environment, self.companions
        )

    def job(self, target: int = 0) -> JobDirectory:
        """The job as it is on the disk now, with the blocks of one of its formats."""
        options, record = self.options, self.record
        if self.others:
            record = _joined([request.plan.format for request in self.all], self.all)
        return JobDirectory(
            options.job_directory,
            record,
            options.any_environment,
            self.unknown,
            self._scheme_of(target),
            target,
        )

    def _scheme_of(self, target: int) -> Callable[[str], Scheme]:
        plan = self.all[target].plan
        return lambda path: plan.quantized_layer(path).scheme


def _joined(names: Sequence[str], requests: Sequence[CheckedJob]) -> dict[str, Any]:
    """The record of a job for several formats: what they share, and what each has of its own."""
    shared = {key: requests[0].record[key] for key in SHARED if key in requests[0].record}
    own = [{k: v for k, v in request.record.items() if k not in shared} for request in requests]
    return {**shared, "formats": dict(zip(names, own, strict=True))}


def prepare(
    options: QuantizeOptions,
    extension: Extension | None = None,
    model: FloatCheckpoint | None = None,
) -> CheckedJob:
    """Checks a request against the model, the data and the disk, before any work.

    Args:
        options: the request.
        extension: what another command computes and writes instead; it has checked that the
            values fit their types.
        model: the opened model, where the caller has it.

    Raises:
        MsQuantError: anything that would make the job fail later.
    """
    options = replace(options, model=model_directory(options.model))
    opened = cache(open_float) if model is None else lambda _: model
    if options.recipe is not None:
        options = _with_recipe(options, options.recipe)
    if len(options.formats) > 1:
        checked = _prepare_several(options, opened)
    else:
        checked = _prepare(options, opened, extension)
    _check_disk(checked)
    if options.recipe is not None:
        said = recipe_notes(checked.plan.config, options.recipe)
        return replace(checked, notes=(*said, *checked.notes))
    return checked


def _with_recipe(options: QuantizeOptions, recipe: Recipe) -> QuantizeOptions:
    """What the recipe says of the output, where nothing else was asked for."""
    formats = options.formats or recipe.formats
    sizes = options.shard_bytes
    if recipe.shard_bytes is not None and sizes is None:
        sizes = recipe.shard_bytes or sys.maxsize
    return replace(options, formats=formats, shard_bytes=sizes)


def _with_data(options: QuantizeOptions, plan: Plan) -> QuantizeOptions:
    """The calibration data that the recipe names, if the plan needs any and none was given."""
    recipe = options.recipe
    if recipe is None or not (plan.needs_calibration or options.calib):
        return options
    given = {name: getattr(options, name) for name in ("samples", "seq_len", "seed")}
    found = {name: getattr(recipe, name) for name in given}
    calib = options.calib or (None if recipe.calib is None else Path(recipe.calib))
    if options.calib is None and calib is not None and not calib.exists():
        raise BadArgumentError(
            f"{calib}: the calibration data of the recipe is neither here nor beside it nor in a "
            f"{CALIB_DIRECTORY} near it, expected --calib FILE"
        )
    merged = {name: found[name] if given[name] is None else given[name] for name in given}
    return replace(options, calib=calib, **merged)


def _prepare(
    options: QuantizeOptions, opened: Opened, extension: Extension | None = None
) -> CheckedJob:
    """Everything but what is on the disk by now."""
    check_paths(options.model, options.output, options.job_directory)
    config, checkpoint = opened(options.model)
    if extension is None:  # another command has names of its own
        options = with_best(options, by_part("scheme", options.scheme).names, config)
    plan = original = _plan(config, options)
    options = _with_data(options, plan)
    refuse_unused(options, plan)
    if options.tp is not None:
        refuse_ranks(plan, options.tp)
    plan, tensors = rotated(plan, checkpoint)
    notes = plan_notes(options, plan)
    if extension is None:
        notes += rank_notes(plan) if options.tp is None else []
        options = replace(options, shard_bytes=options.most_shard_bytes)
        extension = Extension({}, {"shard_bytes": options.shard_bytes}, output_bytes(plan))
        check_fits(checkpoint, float_tensors(original), plan.dtype)
    tokens = None
    if plan.needs_calibration or options.calib is not None:
        tokens = _calibration_tokens(options, plan, notes.append)
        notes += data_notes(options, plan, config, tokens)
    record = {**_record(options, plan, checkpoint, tokens), **extension.numbers}
    return CheckedJob(
        options,
        plan,
        checkpoint,
        tensors,
        tokens,
        record,
        {**record, **extension.writing},
        extension.output_bytes,
        extension.unknown,
        companions=companion_files(options.model),
        notes=(*model_notes(config, checkpoint), *notes),
    )


def _prepare_several(options: QuantizeOptions, opened: Opened) -> CheckedJob:
    """One request for several formats.

    Raises:
        MsQuantError: a format is asked for twice, or cannot be made.
    """
    names, job = list(options.formats), options.job_directory
    if len(set(names)) < len(names):
        raise BadArgumentError(f"formats {', '.join(names)}: expected each once")
    _refuse_occupied(options.output)
    parts = [
        replace(options, formats=(name,), output=options.output / name, job=job) for name in names
    ]
    first, *others = (_prepare(part, opened) for part in parts)
    return replace(first, others=tuple(others))


def _refuse_occupied(output: Path) -> None:
    """Refuses a directory for several formats with anything in it but directories of formats."""
    known = {f"{name}{ending}" for name in FORMATS for ending in ("", ".partial")}
    if output.is_dir():
        names = {path.name for path in output.iterdir()}
        others = sorted(names - known)
        if names & known:  # what a hub or a person has added since
            others = [name for name in others if is_read(name)]
        if others:
            raise BadArgumentError(
                f"{output}: holds {others[0]!r}, expected a new directory for several formats"
            )


def _plan(config: ModelConfig, options: QuantizeOptions) -> Plan:
    dtype, format = output_dtype(config, options.dtype), next(iter(options.formats), "")
    shared: dict[str, Any] = {
        "format": format,
        "smoothing_target": options.smoothing_target,
        "float_undivided": options.float_undivided,
    }
    if options.recipe is not None:
        return plan_of_recipe(config, options.recipe, dtype, **shared)
    return make_plan(
        config,
        options.scheme,
        options.algorithm,
        dtype=dtype,
        exclude=options.exclude,
        scheme_options=options.scheme_options,
        algorithm_options=options.algorithm_options,
        kv_cache="" if options.kv_cache == FLOAT_CACHE else options.kv_cache,
        **shared,
    )


def rotated(plan: Plan, checkpoint: Checkpoint) -> tuple[Plan, FloatTensors]:
    """The plan and the tensors of the model that is quantized."""
    plan = replace(plan, router_dtype=router_dtype(plan.config, checkpoint))
    options = plan.distinct[0].algorithms.options.get("quarot")
    if options is None:
        return plan, checkpoint
    rotated = RotatedCheckpoint(checkpoint, plan.config, options.seed, options.block_size)
    return replace(plan, config=rotated.config), rotated


def _record(
    options: QuantizeOptions, plan: Plan, checkpoint: Checkpoint, tokens: np.ndarray | None
) -> dict[str, Any]:
    """What decides the numbers of a job."""
    record: dict[str, Any] = {
        **plan.record(),
        "exclude": list(options.exclude),
        "source": fingerprint(checkpoint),
        "environment": {"ms_quant": __version__},
    }
    if options.recipe is None and (parts := by_part("scheme", options.scheme)).named:
        record["parts"] = {**({REST: parts.usual} if parts.usual else {}), **parts.named}
    floats = [str(group) for group, layer in plan.layers.items() if layer is None]
    if options.recipe is not None and floats:
        record["float"] = floats
    if plan.config.no_head:
        record["head"] = NO_HEAD
    if tokens is not None:
        record["calibration"] = data_record(options, tokens)
        record["environment"] |= environment(plan.any("trains"))
    return record


def refuse_unused(options: QuantizeOptions, plan: Plan) -> None:
    """Refuses what was asked for and would change nothing.

    Raises:
        MsQuantError: names the option.
    """
    if options.all_tokens and plan.config.routing is None:
        raise BadArgumentError("--all-tokens: the model has no routed experts, expected some")
    float16 = plan.dtype.name == "float16"
    if plan.needs_calibration or (float16 and options.calib is not None):
        return
    for name in ("calib", "samples", "seq_len", "seed", "all_tokens"):
        value = getattr(options, name)
        if value is not None and value is not False:  # a seed may be 0
            also = " unless --calib FILE gives some to check float16 by" if float16 else ""
            raise BadArgumentError(
                f"scheme {plan.scheme_name} with {plan.algorithm} uses no calibration data, "
                f"expected no --{name.replace('_', '-')}{also}"
            )


def _check_disk(checked: CheckedJob) -> None:
    outputs = [(request, request.output()) for request in checked.all]
    if all(output.finished for _, output in outputs):
        return
    tokens = 0 if checked.tokens is None else checked.tokens.size
    left = [(output, r.output_bytes) for r, output in outputs if not output.finished]
    check_space([request.plan for request in checked.all], tokens, left, checked.job())


def output_dtype(config: ModelConfig, name: str | None) -> np.dtype:
    """The type of what stays float: as asked, else the model's, else bfloat16 for float32."""
    if name is None:
        name = "bfloat16" if config.dtype == "float32" else config.dtype
    if name not in ("bfloat16", "float16"):
        raise UnsupportedError(f"dtype {name!r} is not supported, expected 'bfloat16' or 'float16'")
    return DTYPES[name]


def _require_mindspore(why: str) -> None:
    """Raises one sentence with the command that installs MindSpore when it is missing."""
    if find_spec("mindspore") is None:
        raise UnsupportedError(
            f"{why}, which needs MindSpore: pip install 'ms-quant[mindspore]' "
            "(or mindspore and 'numpy<2')"
        )


def _calibration_tokens(
    options: QuantizeOptions, plan: Plan, note: Callable[[str], None]
) -> np.ndarray:
    what = f"kv cache {plan.kv_cache}"
    if plan.any("calibrated"):
        what = f"algorithm {plan.algorithm}"
    for layer in plan.distinct:
        if layer.scheme.needs_calibration:
            what = f"scheme {layer.scheme.name}"
    if plan.any("trains"):
        _require_mindspore(f"{what} trains on calibration data")
    if options.calib is None:
        raise BadArgumentError(
            f"{what} needs calibration data, expected --calib FILE (text, JSON records, .parquet "
            "or .npz)"
        )
    from ms_quant.data.calibration import load_tokens  # whose libraries data-free jobs do without

    return load_tokens(options.calib, options.model, *options.windows, note)


def float_tensors(plan: Plan) -> list[str]:
    """Names of the tensors that stay float."""
    weights = {f"{path}.weight" for path in plan.quantized()}
    return [name for name in plan.config.parameter_shapes() if name not in weights]


def needed_bytes(checked: CheckedJob) -> int:
    """Disk space of a job from its beginning: output, blocks, two sets of hidden states."""
    tokens = 0 if checked.tokens is None else checked.tokens.size
    plans = [request.plan for request in checked.all]
    return sum(request.output_bytes for request in checked.all) + job_bytes(plans, tokens)
