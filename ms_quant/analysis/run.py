"""From a float checkpoint to what hurts: one pass over the calibration data."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from ms_quant.analysis.records import (
    VERSION,
    GroupSensitivity,
    InputFacts,
    SchemeError,
    Sensitivity,
)
from ms_quant.analysis.request import AnalyzeOptions, CheckedAnalysis, prepare_analysis
from ms_quant.analysis.work import CACHE_GROUP, DECODE, AnalysisWork
from ms_quant.errors import JobConflictError
from ms_quant.job.directory import JobDirectory, explain_difference
from ms_quant.job.redo import redoing
from ms_quant.models.block_spec import BlockSpec
from ms_quant.models.names import block_prefix
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.pipeline.quantize import READING
from ms_quant.pipeline.run import prove_source
from ms_quant.progress import BlockProgress, PartProgress, StepProgress, of_blocks, silent
from ms_quant.quantization.executor import InOrder

ANALYZING = "analyzing"
Found = dict[tuple[int, str], dict[str, dict[str, float]]]
"""Block and group to scheme and phase to measures."""


def analyze(
    model: str | PathLike[str],
    calibration: str | PathLike[str],
    schemes: Sequence[str] = ("W8A8",),
    *,
    algorithm: str = DEFAULTS.algorithm,
    output: str | PathLike[str] | None = None,
    progress: StepProgress | None = None,
    scheme_options: Mapping[str, Any] | None = None,
    algorithm_options: Mapping[str, Any] | None = None,
    format: str = "",
    dtype: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    probe_tokens: int | None = None,
    job: str | PathLike[str] | None = None,
    keep_job: bool = False,
    any_environment: bool = False,
) -> Sensitivity:
    """How sensitive a model is to each scheme, group by group, from one calibration.

    Every group of linears that read one input is quantized alone, in each scheme. It is measured
    what that changes at the group's own output, at the block's, and,
    through all blocks after it, in what the model predicts.

    Args:
        model: directory of a Hugging Face checkpoint.
        calibration: file of calibration data (text, JSON records, .parquet or .npz).
        schemes: names of ``ms_quant.SCHEMES``, and ``"C8"`` or ``"C8_DYNAMIC"`` for the cache of
            keys and values.
        algorithm: names of ``ms_quant.ALGORITHMS``, joined with ``+``; each scheme is prepared by
            those that suit it.
        output: JSON file to make; None only returns what it would hold.
        progress: told how far the steps ``"reading the model"`` and ``"analyzing"`` are.
        scheme_options: options of the weights, for those schemes that take them:
            ``{"group_size": 64}``.
        algorithm_options: options of the algorithms: ``{"alpha": 0.7}``.
        format: the checkpoint format whose numerics count; "" is each scheme's first.
        dtype: type of what stays float; None is the model's.
        samples: windows of calibration data; None is 64.
        seq_len: tokens of a window; None is 256.
        seed: seed of the choice of windows; None is 0.
        probe_tokens: about how many tokens the variants run on; None is as many as make the
            analysis cost at most half as much again as quantizing.
        job: directory of the work in progress; None is the output's name with ``.job`` after it.
        keep_job: leave the job directory when all is done.
        any_environment: go on with a job that was begun under other versions, another kind of CPU
            or another number of threads.

    Returns:
        Sensitivity: the measures of every group, and which inputs have massive activations.

    Raises:
        MsQuantError: something that is asked for cannot be done, or a value of the model is not
            finite.

    Examples:
        >>> import ms_quant
        >>> found = ms_quant.analyze(
        ...     "Qwen3-8B", "calib.txt", ["W8A8", "W8A8_DYNAMIC"], samples=8, seq_len=32
        ... )
        >>> worst = found.ranked("W8A8")[0]
        >>> worst.score("W8A8", "loss_increase") > 0
        True
    """
    with tempfile.TemporaryDirectory(prefix="ms-quant-analyze-") as directory:
        options = AnalyzeOptions(
            QuantizeOptions(
                model=Path(model),
                output=Path(directory) / "sensitivity.json" if output is None else Path(output),
                algorithm=algorithm,
                scheme_options=scheme_options or {},
                algorithm_options=algorithm_options or {},
                calib=Path(calibration),
                samples=samples,
                seq_len=seq_len,
                seed=seed,
                dtype=dtype,
                job=None if job is None else Path(job),
                keep_job=keep_job,
                any_environment=any_environment,
            ),
            schemes,
            format,
            probe_tokens,
        )
        checked, told = prepare_analysis(options), progress or silent
        return run_analysis(
            checked,
            of_blocks(told, ANALYZING, checked.checked.plan.config.num_layers),
            lambda part: told(READING, part),
        )


def run_analysis(
    asked: CheckedAnalysis, progress: BlockProgress = silent, reading: PartProgress = silent
) -> Sensitivity:
    """Does an analysis, or goes on with it, and writes its file; one that is there is read.

    Raises:
        MsQuantError: the file is of another analysis, or a value is not finite.
    """
    checked, started = asked.checked, time.monotonic()
    path = checked.options.output
    if path.exists():
        return _finished(asked, path)
    job = checked.job()
    with job.open():
        prove_source(checked, job, reading)
        jobs = [job, *map(asked.job, range(1, len(asked.subject.all)))]
        work = AnalysisWork(asked.subject, jobs, checked.tensors, asked.tokens, progress)
        redoing(job, lambda: InOrder().run(work), blocks=False)
        groups = _groups(asked, job, work)
        seconds = round(time.monotonic() - started, 1)
        found = Sensitivity(
            VERSION, str(checked.options.model), job.record, asked.schemes, groups, seconds
        )
        found.save(path)
        if not checked.options.keep_job:
            job.remove()
    return found


def _finished(asked: CheckedAnalysis, path: Path) -> Sensitivity:
    """The analysis that a file holds, if it is the one that is asked for.

    Raises:
        MsQuantError: it is another.
    """
    found = Sensitivity.load(path)
    different = explain_difference(found.request, asked.checked.record, "made", True)
    if different:
        raise JobConflictError(
            f"{path}: holds another analysis: {different[1]}; expected another output, or delete it"
        )
    return found


def _groups(
    asked: CheckedAnalysis, job: JobDirectory, work: AnalysisWork
) -> tuple[GroupSensitivity, ...]:
    """Every group with its measures, in model order."""
    measures: Found = {}
    inputs: dict[tuple[int, str], InputFacts] = {}
    config = asked.checked.plan.config
    for index in range(config.num_layers):
        notes = job.notes(index)
        measures |= {(index, name): found for name, found in notes["errors"].items()}
        for name, facts in notes["inputs"].items():
            lists = {key: tuple(facts[key]) for key in ("channels", "positions")}
            inputs[index, name] = InputFacts(**{**facts, **lists})
    for (index, (name, scheme, phase)), value in work.loss_increases().items():
        measures[index, name][f"{scheme}/{phase}"]["loss_increase"] = value
    made = []
    for block in config.blocks:
        for name in [*(group.name for group in block.groups), CACHE_GROUP]:
            found = measures.get((block.index, name))
            if found:
                made.append(_group(block, name, found, inputs.get((block.index, name))))
    return tuple(made)


def _group(
    block: BlockSpec,
    name: str,
    found: Mapping[str, Mapping[str, float]],
    facts: InputFacts | None,
) -> GroupSensitivity:
    schemes = {}
    for key, values in found.items():
        scheme, _, phase = key.partition("/")
        if phase == DECODE:
            continue
        other = found.get(f"{scheme}/{DECODE}")
        decode = None if other is None else _error(other)
        schemes[scheme] = replace(_error(values), decode=decode)
    prefix = block_prefix(block.index)
    if name == CACHE_GROUP:
        paths = tuple(f"{prefix}{path}" for path in block.cached)
        return GroupSensitivity(block.index, name, name, paths, 0, None, schemes)
    group = block.group(name)
    return GroupSensitivity(
        block.index,
        name,
        group.kind,
        tuple(f"{prefix}{member}" for member in group.members),
        sum(linear.size for linear in group.linears.values()),
        facts,
        schemes,
    )


def _error(values: Mapping[str, Any]) -> SchemeError:
    return SchemeError(**values)
