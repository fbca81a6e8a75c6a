"""Checking what ``ms-quant analyze`` is asked: every refusal that needs no work."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant import __version__
from ms_quant.algorithms import PLAIN
from ms_quant.algorithms.pipeline import suiting
from ms_quant.analysis.probe import affordable_tokens, probe_of
from ms_quant.analysis.work import Subject, variants_of
from ms_quant.data.calibration import Note, load_tokens
from ms_quant.errors import BadArgumentError, MsQuantError, UnsupportedError
from ms_quant.evaluation.head import require_head
from ms_quant.files.atomic import free_spaces_check
from ms_quant.files.reader import Checkpoint, fingerprint
from ms_quant.formats.float_model import FloatCheckpoint, model_notes, open_float
from ms_quant.formats.source_kind import model_directory
from ms_quant.job.directory import JobDirectory, environment
from ms_quant.models.config import ModelConfig
from ms_quant.pipeline.best import with_best
from ms_quant.pipeline.building import check_cache_kind
from ms_quant.pipeline.calibration import data_notes, data_record
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.pipeline.paths import check_paths
from ms_quant.pipeline.planning import make_plan
from ms_quant.pipeline.request import CheckedJob, output_dtype, rotated
from ms_quant.pipeline.writer import output_bytes
from ms_quant.plan.plan import Plan
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.table import KV_CACHES, SCHEMES, taken_options

BASE = "W8A8_DYNAMIC"  # its plan says the types where only caches are analysed


@dataclass(frozen=True)
class AnalyzeOptions:
    """What a user asks of ``ms-quant analyze``.

    Attributes:
        job: the model, the calibration data, where the result and the work go.
        schemes: names of schemes and kinds of cache.
        format: the checkpoint format whose numerics count; "" is each scheme's first.
        probe_tokens: about how many tokens variants run on; None is as many as cost little.
        effort: how many times as many.
        probed: int32 (windows, tokens) that variants run on; None is calibration data.
        keeps_linears: the job keeps the quantized linears of each scheme.
        made_later: the directory that the result goes to is not there yet.
    """

    job: QuantizeOptions
    schemes: Sequence[str]
    format: str = ""
    probe_tokens: int | None = None
    effort: int = 1
    probed: np.ndarray | None = None
    keeps_linears: bool = False
    made_later: bool = False


@dataclass(frozen=True)
class CheckedAnalysis:
    """A checked request.

    Attributes:
        checked: the model, the tokens and the job.
        subject: what is analysed.
        schemes: in the order that they were asked for.
        notes: what to know, one sentence each.
    """

    checked: CheckedJob
    subject: Subject
    schemes: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def tokens(self) -> np.ndarray:
        """int32 (windows, tokens) calibration data."""
        assert self.checked.tokens is not None
        return self.checked.tokens

    def job(self, target: int) -> JobDirectory:
        """The job as it is on the disk now, with the linears of one of the plans."""
        options, plan = self.checked.options, self.subject.all[target]
        return JobDirectory(
            options.job_directory,
            self.checked.record,
            options.any_environment,
            scheme_of=lambda path: plan.quantized_layer(path).scheme,
            target=target,
        )


def prepare_analysis(
    options: AnalyzeOptions, model: FloatCheckpoint | None = None
) -> CheckedAnalysis:
    """Checks a request against the model and the data.

    Args:
        options: the request.
        model: the opened model, where the caller has it.

    Raises:
        MsQuantError: anything that would make the work fail later.
    """
    job = replace(options.job, model=model_directory(options.job.model))
    schemes = _distinct(options.schemes)
    if not options.made_later:
        check_file(job.output)
    check_paths(job.model, job.output, job.job_directory)
    model = model or open_float(job.model)
    config = model.config
    require_head(model)
    job = with_best(job, schemes, config)
    options = replace(options, job=job)
    caches = [name for name in schemes if name in KV_CACHES]
    for name in caches:
        check_cache_kind(config, name)
    plain = replace(options, format="")
    plans = {name: _plan(config, name, options) for name in schemes if name not in caches}
    refuse_idle([SCHEMES[name] for name in plans], job)
    base, tensors = rotated(
        next(iter(plans.values()), None) or _plan(config, BASE, plain), model.checkpoint
    )
    config = base.config
    plans = {name: replace(plan, config=config) for name, plan in plans.items()}
    heard: list[str] = []
    tokens = _tokens(job, heard.append)
    begin = [len(variants_of(plans, caches, block)) for block in config.blocks]
    probed = tokens if options.probed is None else options.probed
    wanted = options.probe_tokens or options.effort * affordable_tokens(config, begin, probed.size)
    probe = probe_of((len(probed), probed.shape[1]), wanted)
    keeps = options.keeps_linears
    subject = Subject(plans, caches, base, probe, probe.of(probed), keeps)
    record = _record(options, model.checkpoint, subject, schemes, tokens)
    checked = CheckedJob(job, base, model.checkpoint, tensors, tokens, record, {}, 0)
    states = probe.tokens * config.hidden_size * 4 * (1 + sum(begin))
    needed = 2 * (states + 4 * tokens.size * config.hidden_size)
    needed += sum(output_bytes(plan) for plan in plans.values()) if keeps else 0
    free_spaces_check({job.job_directory: needed})
    notes = [*model_notes(config, model.checkpoint), *_float_notes(plans), *heard]
    notes += data_notes(job, None, config, tokens)
    return CheckedAnalysis(checked, subject, schemes, tuple(notes))


def check_file(path: Path) -> None:
    """Refuses what would fail when all work is done.

    Raises:
        MsQuantError: a directory is there, or none for the file.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise BadArgumentError(
            f"{path}: cannot be made, expected a file name in a directory there is"
        )


def _distinct(schemes: Sequence[str]) -> tuple[str, ...]:
    """The names, each known and there once."""
    if isinstance(schemes, str):
        raise BadArgumentError(f"schemes is {schemes!r:.80}, expected a list of names")
    if not schemes:
        raise BadArgumentError("no scheme is asked for, expected at least one")
    for name in schemes:
        if name not in SCHEMES and name not in KV_CACHES:
            known = ", ".join([*SCHEMES, *KV_CACHES])
            raise BadArgumentError(f"scheme {name!r} is unknown, expected one of {known}")
    if len(set(schemes)) < len(schemes):
        raise BadArgumentError(f"schemes {', '.join(schemes)}: expected each once")
    return tuple(schemes)


def _plan(config: ModelConfig, scheme: str, options: AnalyzeOptions) -> Plan:
    job = options.job
    algorithm, settings = suiting(job.algorithm, SCHEMES[scheme], job.algorithm_options)
    make = partial(
        make_plan,
        config,
        scheme,
        algorithm,
        algorithm_options=settings,
        dtype=output_dtype(config, job.dtype),
        scheme_options=taken_options(scheme, job.scheme_options),
        format=options.format,
    )
    try:
        plan = make(float_undivided=True)
    except BadArgumentError as error:
        try:
            make()
        except MsQuantError as reason:
            if str(reason) == str(error):
                raise
            raise BadArgumentError(
                f"scheme {scheme}: no linear can take it, as {reason.found}; expected another "
                "group size or scheme"
            ) from None
        raise
    if plan.any("trains"):
        raise UnsupportedError(
            f"scheme {scheme} trains each group, which costs many times what an analysis may, "
            "expected another"
        )
    return plan


def refuse_idle(schemes: Sequence[Scheme], job: QuantizeOptions) -> None:
    """Refuses an algorithm or an option that none of some schemes takes.

    Raises:
        MsQuantError: names it.
    """
    listed = ", ".join(scheme.name for scheme in schemes) or "a cache"
    for name in job.scheme_options:
        if not any(name in scheme.options for scheme in schemes):
            raise BadArgumentError(f"no scheme of {listed} takes {name}, expected no such option")
    kept = [suiting(job.algorithm, scheme, job.algorithm_options) for scheme in schemes]
    for name in job.algorithm.split("+"):
        if name != PLAIN and not any(name in names.split("+") for names, _ in kept):
            raise BadArgumentError(
                f"algorithm {name} suits no scheme of {listed}, expected none that changes nothing"
            )
    for name in job.algorithm_options:
        if not any(name in settings for _, settings in kept):
            raise BadArgumentError(
                f"no algorithm of {job.algorithm} takes {name}, expected no such option"
            )


def _tokens(job: QuantizeOptions, note: Note) -> np.ndarray:
    if job.calib is None:
        raise BadArgumentError(
            "an analysis needs calibration data, expected --calib FILE (text, JSON records, "
            ".parquet or .npz)"
        )
    tokens = load_tokens(job.calib, job.model, *job.windows, note)
    if tokens.shape[1] < 2:
        raise BadArgumentError(f"seq_len is {tokens.shape[1]}, expected at least 2")
    return tokens


def _record(
    options: AnalyzeOptions,
    checkpoint: Checkpoint,
    subject: Subject,
    schemes: Sequence[str],
    tokens: np.ndarray,
) -> dict[str, Any]:
    """What decides the numbers."""
    plans = {name: plan.record() for name, plan in subject.plans.items()}
    return {
        "analysis": {name: plans.get(name, name) for name in schemes},
        "dtype": subject.base.dtype.name,
        "probe": {
            "windows": list(subject.probe.windows),
            "tokens": subject.probe.length,
            "sha256": hashlib.sha256(subject.probed.tobytes()).hexdigest(),
        },
        "source": fingerprint(checkpoint),
        "calibration": data_record(options.job, tokens),
        "environment": {"ms_quant": __version__, **environment()},
    }


def _float_notes(plans: Mapping[str, Plan]) -> list[str]:
    """Sentences about what a scheme cannot take."""
    notes = []
    for name, plan in plans.items():
        left = plan.float_linears()
        if left:
            notes.append(
                f"{name}: its groups do not divide the inputs of {len(left)} linears, such as "
                f"{left[0]}, which are not analysed with it"
            )
    return notes
