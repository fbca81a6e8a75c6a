"""The recipe of a choice: it runs again by itself, and can be read and changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ms_quant.algorithms import ALGORITHMS
from ms_quant.algorithms.pipeline import AlgorithmPipeline, get_algorithms, suiting
from ms_quant.mixed_precision.costs import FLOAT
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import GroupId, block_prefix
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.recipe import Recipe, Rule, Step
from ms_quant.recipe.checks import CHOOSING
from ms_quant.recipe.records import EVERYTHING
from ms_quant.schemes.table import FLOAT_CACHE, SCHEMES, taken_options


def recipe_of(
    config: ModelConfig,
    chosen: Mapping[GroupId, str],
    job: QuantizeOptions,
    format: str,
    made: Mapping[str, Any],
) -> Recipe:
    """The recipe of a choice.

    Args:
        config: the model.
        chosen: every group to its scheme.
        job: the algorithms, the options of all schemes, and the calibration data.
        format: the checkpoint format.
        made: what to say about how it was made.
    """
    paths: dict[str, list[str]] = {}
    for group, scheme in chosen.items():
        members = config.block(group.block).group(group.name).members
        own = paths.setdefault(scheme, [])
        own += [f"{block_prefix(group.block)}{member}" for member in members]
    schemes = [scheme for scheme in paths if scheme != FLOAT]
    pipelines = {scheme: _pipeline(scheme, job) for scheme in schemes}
    calibrated = job.kv_cache != FLOAT_CACHE or any(
        SCHEMES[scheme].needs_calibration or pipeline.any("calibrated")
        for scheme, pipeline in pipelines.items()
    )
    data = job if calibrated and job.calib is not None else None
    return Recipe(
        rules=tuple(_rule(scheme, pipelines[scheme], job, paths) for scheme in schemes),
        steps=tuple(_steps(pipelines, paths)),
        kv_cache="" if job.kv_cache == FLOAT_CACHE else job.kv_cache,
        formats=(format,),
        calib=None if data is None or data.calib is None else str(data.calib.absolute()),
        samples=None if data is None else data.samples,
        seq_len=None if data is None else data.seq_len,
        seed=None if data is None else data.seed,
        made=made,
    )


def _pipeline(scheme: str, job: QuantizeOptions) -> AlgorithmPipeline:
    names, settings = suiting(job.algorithm, SCHEMES[scheme], job.algorithm_options)
    return get_algorithms(names, SCHEMES[scheme], settings)


def _rule(
    scheme: str, pipeline: AlgorithmPipeline, job: QuantizeOptions, paths: Mapping[str, list[str]]
) -> Rule:
    names = tuple(name for name in pipeline.names if ALGORITHMS[name].stage in CHOOSING)
    include, exclude = _reaching([scheme], paths)
    return Rule(
        scheme=scheme,
        options=taken_options(scheme, job.scheme_options),
        algorithms=names,
        algorithm_options={
            f"{name}.{key}": value
            for name in names
            for key, value in _changed(name, pipeline.options[name]).items()
        },
        include=include,
        exclude=exclude,
    )


def _steps(
    pipelines: Mapping[str, AlgorithmPipeline], paths: Mapping[str, list[str]]
) -> Iterator[Step]:
    """What is done before anything is rounded, in the order of the stages."""
    options = {
        name: pipeline.options[name] for pipeline in pipelines.values() for name in pipeline.names
    }
    for name in sorted(options, key=lambda name: ALGORITHMS[name].stage):
        if ALGORITHMS[name].stage in CHOOSING:
            continue
        takers = [scheme for scheme, pipeline in pipelines.items() if name in pipeline.names]
        every = len(takers) == len(pipelines)
        include, exclude = (EVERYTHING, ()) if every else _reaching(takers, paths)
        yield Step(name, _changed(name, options[name]), include, exclude)


def _reaching(
    schemes: Sequence[str], paths: Mapping[str, list[str]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What to include and to exclude for the linears of some schemes: the shorter list."""
    own = [path for scheme in schemes for path in paths[scheme]]
    others = [path for scheme in paths if scheme not in schemes for path in paths[scheme]]
    if len(own) <= len(others):
        return tuple(own), ()
    return EVERYTHING, tuple(others)


def _changed(name: str, options: Any) -> dict[str, Any]:
    """The options of an algorithm that are not as by default."""
    usual = ALGORITHMS[name].options
    return (
        {} if options is None else {k: v for k, v in vars(options).items() if v != vars(usual)[k]}
    )
