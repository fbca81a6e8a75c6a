"""Checking what automatic mixed precision is asked: every refusal that needs no work."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.algorithms.pipeline import suiting
from ms_quant.analysis.records import Sensitivity
from ms_quant.analysis.request import AnalyzeOptions, CheckedAnalysis, prepare_analysis, refuse_idle
from ms_quant.errors import BadArgumentError, MsQuantError, UnsupportedError
from ms_quant.formats.float_model import FloatCheckpoint, open_float
from ms_quant.formats.source_kind import model_directory
from ms_quant.mixed_precision.costs import FLOAT, Cost, bits_between, costs, fixed_bytes
from ms_quant.mixed_precision.goal import bits_of, bytes_between, check_goal, check_size
from ms_quant.mixed_precision.heldout import heldout_windows
from ms_quant.models.names import GroupId
from ms_quant.pipeline.best import with_best
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.pipeline.paths import check_paths
from ms_quant.pipeline.planning import make_plan
from ms_quant.pipeline.request import output_dtype
from ms_quant.plan.plan import Plan
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.support import served_formats, store
from ms_quant.schemes.table import FLOAT_CACHE, SCHEMES, get_scheme, taken_options

ANALYSIS, ANALYSIS_JOB = "analysis.json", "analysis.job"
EFFORT = 4
"""How many times as much an analysis may take of its tokens, the held-out ones here, as ``ms-quant
analyze`` does: about as much as measuring a choice or two."""
PER_TOKEN = {"W8A8": "W8A8_DYNAMIC", "W8A8_MIX": "W8A8_DYNAMIC"}
ANY_DTYPE = np.dtype(np.float32)


@dataclass(frozen=True)
class MixedOptions:
    """What a user asks of automatic mixed precision.

    Attributes:
        job: the model, the output, the calibration data, the algorithms and the options of all
            schemes.
        choose: names of schemes, and ``"FLOAT"``; none is the job's scheme, the same per token
            where every runtime that serves the one serves both, and float.
        max_ppl_increase: by how much perplexity may grow; 0.005 is 0.5 %.
        target_bits: stored bits of a weight in the mean, scales and all.
        heldout: the text that perplexity is measured on; None is other windows of the calibration
            data, and a text that comes with the package.
        sensitivity: file of an analysis that was made before; None makes one.
        target_bytes_per_token: what a step of decode reads of the weights for one token.
    """

    job: QuantizeOptions
    choose: Sequence[str]
    max_ppl_increase: float | None = None
    target_bits: float | None = None
    heldout: Path | None = None
    sensitivity: Path | None = None
    target_bytes_per_token: int | None = None


@dataclass(frozen=True)
class CheckedMixed:
    """A checked request.

    Attributes:
        options: what was asked, with the model's directory.
        model: the opened model.
        format: the checkpoint format.
        schemes: those that are chosen from, but float.
        costs: group to what it costs in each scheme that it can take.
        fixed_bytes: what decode reads for a token whatever is chosen.
        heldout: int32 (windows, tokens); None where nothing is measured.
        analysis: what is to be analysed; None where a file holds that.
        sensitivity: what a file holds.
        asked: what decides the choice, as JSON.
        notes: what to know, one sentence each.
    """

    options: MixedOptions
    model: FloatCheckpoint
    format: str
    schemes: tuple[str, ...]
    costs: dict[GroupId, dict[str, Cost]]
    fixed_bytes: int
    heldout: np.ndarray | None
    analysis: CheckedAnalysis | None
    sensitivity: Sensitivity | None
    asked: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def target_bits(self) -> float | None:
        """The size that is asked for, in stored bits of a weight of the groups."""
        target = self.options.target_bytes_per_token
        if target is None:
            return self.options.target_bits
        return bits_of(target, self.fixed_bytes, self.costs)

    @property
    def directory(self) -> Path:
        """Where the work in progress is."""
        return self.options.job.job_directory

    @property
    def recipe_path(self) -> Path:
        """Where the recipe goes."""
        output = self.options.job.output
        return output.with_name(f"{output.name}.recipe.yaml")

    def as_json(self) -> dict[str, Any]:
        """What a dry run prints."""
        choose = self.options.choose
        least, most = bits_between(self.costs, choose)
        fewest, largest = bytes_between(self.costs, choose, self.fixed_bytes)
        return {
            "output": str(self.options.job.output),
            "recipe": str(self.recipe_path),
            **{name: value for name, value in self.asked.items() if name != "heldout_sha256"},
            "groups": len(self.costs),
            "least_bits_per_weight": least,
            "most_bits_per_weight": most,
            "least_bytes_per_token": fewest,
            "most_bytes_per_token": largest,
        }


def prepare_mixed(options: MixedOptions) -> CheckedMixed:
    """Checks a request against the model and the data.

    Raises:
        MsQuantError: anything that would make the work fail later.
    """
    target, token_bytes = options.target_bits, options.target_bytes_per_token
    check_goal(options.max_ppl_increase, target, token_bytes)
    job = replace(options.job, model=model_directory(options.job.model))
    options = replace(options, choose=options.choose or _usual(job))
    schemes = _schemes(options.choose)
    check_paths(job.model, job.output, job.job_directory)
    format = _common_format(schemes, job)
    model = open_float(job.model)
    if model.config.routing is not None:
        raise UnsupportedError(
            f"{job.model}: has routed experts, of which runtimes take one scheme for a layer; a "
            "goal chooses for each group, expected a model without experts, or a --scheme for each "
            "part"
        )
    job = with_best(job, schemes, model.config)
    options = replace(options, job=job)
    refuse_idle([SCHEMES[name] for name in schemes], job)
    plans = {name: _plan(model, name, options, format) for name in schemes}
    known = costs(plans)
    fixed = fixed_bytes(plans[schemes[0]], known)
    check_size(target, token_bytes, known, options.choose, fixed)
    analysis, found = None, None
    notes: list[str] = []
    measures = options.max_ppl_increase is not None
    heldout = heldout_windows(job, options.heldout, measures, notes.append)
    if options.sensitivity is None:
        analysis = prepare_analysis(_analysis(options, schemes, format, heldout), model)
        notes += analysis.notes
    else:
        found = Sensitivity.load(options.sensitivity)
        _require(found, model, schemes, options.sensitivity)
        notes += _other_algorithm(found, plans, options.sensitivity)
    return CheckedMixed(
        options,
        model,
        format,
        schemes,
        known,
        fixed,
        heldout,
        analysis,
        found,
        _asked(options, format, heldout),
        tuple(notes),
    )


def _usual(job: QuantizeOptions) -> tuple[str, ...]:
    """What there is to choose from for a scheme."""
    scheme = get_scheme(job.scheme, **taken_options(job.scheme, job.scheme_options))
    format = next(iter(job.formats), "")
    runtimes, token = _runtimes(scheme, format), PER_TOKEN.get(scheme.name)
    if token is not None:
        own = store(scheme, ANY_DTYPE, format)[1].format
        both = set(_runtimes(get_scheme(token), own))
        if runtimes and both.issuperset(runtimes):
            return scheme.name, token, FLOAT
    return scheme.name, FLOAT


def _runtimes(scheme: Scheme, format: str) -> tuple[str, ...]:
    """Who serves a scheme in a format; nobody where it cannot hold it."""
    try:
        return store(scheme, ANY_DTYPE, format)[1].support.served_by
    except MsQuantError:
        return ()


def _schemes(choose: Sequence[str]) -> tuple[str, ...]:
    """The schemes that are chosen from, but float."""
    if isinstance(choose, str):
        raise BadArgumentError(f"choose is {choose!r:.80}, expected a list of names")
    for name in choose:
        if name not in SCHEMES and name != FLOAT:
            known = ", ".join([*SCHEMES, FLOAT])
            raise BadArgumentError(f"scheme {name!r:.80} is unknown, expected one of {known}")
    schemes = tuple(name for name in choose if name != FLOAT)
    if len(set(choose)) < len(choose) or len(choose) < 2:
        raise BadArgumentError(
            f"choose is {', '.join(choose) or 'empty'}, expected two names or more, each once"
        )
    return schemes


def _common_format(schemes: Sequence[str], job: QuantizeOptions) -> str:
    """The checkpoint format that is asked for, or the first in which one runtime serves all.

    Raises:
        MsQuantError: no runtime serves all of them.
    """
    if len(job.formats) > 1:
        raise BadArgumentError(
            f"formats {', '.join(job.formats)}: what is served differs, expected one"
        )
    made = [get_scheme(name, **taken_options(name, job.scheme_options)) for name in schemes]
    reasons = []
    able = job.formats or served_formats(
        schemes[0], **taken_options(schemes[0], job.scheme_options)
    )
    for format in able:
        try:
            rows = [store(scheme, ANY_DTYPE, format)[1].support for scheme in made]
        except MsQuantError as error:
            reasons.append(str(error))
            continue
        common = set(rows[0].served_by).intersection(*(row.served_by for row in rows))
        if common:
            return format
        reasons.append(f"no runtime serves {format} checkpoints of {', '.join(schemes)} together")
    raise UnsupportedError(
        f"{'; '.join(reasons) or f'no runtime serves {schemes[0]}'}; expected schemes that one "
        "runtime mixes"
    )


def _plan(model: FloatCheckpoint, scheme: str, options: MixedOptions, format: str) -> Plan:
    """The plan of the whole model in one scheme."""
    job = options.job
    algorithm, settings = suiting(job.algorithm, SCHEMES[scheme], job.algorithm_options)
    return make_plan(
        model.config,
        scheme,
        algorithm,
        algorithm_options=settings,
        scheme_options=taken_options(scheme, job.scheme_options),
        dtype=output_dtype(model.config, job.dtype),
        exclude=job.exclude,
        format=format,
        smoothing_target=job.smoothing_target,
        kv_cache="" if job.kv_cache == FLOAT_CACHE else job.kv_cache,
        float_undivided=job.float_undivided,
    )


def _analysis(
    options: MixedOptions, schemes: Sequence[str], format: str, heldout: np.ndarray | None
) -> AnalyzeOptions:
    directory = options.job.job_directory
    job = replace(
        options.job,
        output=directory / ANALYSIS,
        job=directory / ANALYSIS_JOB,
        keep_job=True,
        kv_cache=FLOAT_CACHE,
    )
    return AnalyzeOptions(
        job, schemes, format, effort=EFFORT, probed=heldout, keeps_linears=True, made_later=True
    )


def _require(
    found: Sensitivity, model: FloatCheckpoint, schemes: Sequence[str], path: Path
) -> None:
    """Refuses an analysis that does not say what is needed."""
    found.require_model(model.checkpoint)
    for scheme in schemes:
        if scheme not in found.schemes:
            raise BadArgumentError(
                f"{path}: has no scheme {scheme}, expected an analysis of {', '.join(schemes)}"
            )


def _other_algorithm(found: Sensitivity, plans: Mapping[str, Plan], path: Path) -> list[str]:
    """A note where an analysis is of other numbers than what is made."""
    of = found.request.get("analysis")
    for scheme, plan in plans.items():
        record = of.get(scheme) if isinstance(of, Mapping) else None
        before = record.get("algorithm") if isinstance(record, Mapping) else None
        if before != plan.algorithm:
            return [
                f"{path}: is an analysis of {scheme} with {before}, and it is made with "
                f"{plan.algorithm}; its estimates are the other's"
            ]
    return []


def _asked(options: MixedOptions, format: str, heldout: np.ndarray | None) -> dict[str, Any]:
    job = options.job
    found: dict[str, Any] = {
        "choose": list(options.choose),
        "max_ppl_increase": options.max_ppl_increase,
        "target_bits": options.target_bits,
        "target_bytes_per_token": options.target_bytes_per_token,
        "format": format,
        "algorithm": job.algorithm,
        "scheme_options": dict(job.scheme_options),
        "algorithm_options": dict(job.algorithm_options),
        "exclude": list(job.exclude),
        "calibration": {
            "file": None if job.calib is None else str(job.calib.absolute()),
            **job.windows._asdict(),
        },
    }
    if heldout is not None:
        found["heldout_windows"] = len(heldout)
        found["heldout_sha256"] = hashlib.sha256(heldout.tobytes()).hexdigest()
    return {name: value for name, value in found.items() if value not in (None, {}, [])}
