"""From a float checkpoint to one whose groups have the schemes that a budget allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ms_quant.analysis.records import Sensitivity
from ms_quant.analysis.run import ANALYZING, run_analysis
from ms_quant.errors import BadFileError, JobConflictError
from ms_quant.files.atomic import write_bytes
from ms_quant.mixed_precision.decision import decide
from ms_quant.mixed_precision.directory import working
from ms_quant.mixed_precision.request import CheckedMixed, MixedOptions, prepare_mixed
from ms_quant.mixed_precision.trials import Trials, plain_request
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.pipeline.quantize import QUANTIZING, READING
from ms_quant.pipeline.request import CheckedJob, prepare
from ms_quant.pipeline.result import Result
from ms_quant.pipeline.run import run_job
from ms_quant.progress import StepProgress, of_blocks, silent
from ms_quant.recipe import Recipe, load_recipe, to_native


@dataclass(frozen=True)
class Made:
    """What a recipe says of how it was made, as :meth:`Decision.facts` has it."""

    __pydantic_config__ = ConfigDict(extra="ignore")

    asked: dict[str, Any]
    groups: dict[str, int]
    bits_per_weight: float
    estimated_increase: float
    moved: list[str]
    bytes_per_token: int | None = None
    perplexity_increase: float | None = None
    perplexity_increase_error: float | None = None
    trials: int = 0


_MADE = TypeAdapter(Made)


@dataclass(frozen=True)
class MixedResult:
    """What automatic mixed precision has made.

    Attributes:
        result: the checkpoint.
        recipe: file of the recipe that makes it again.
        groups: scheme to how many groups have it.
        bits: stored bits of a weight in the mean over all groups, scales and all.
        bytes_per_token: what a step of decode reads of the weights for one token: linears as they
            are stored, head, norms, and a row of the embedding; None of a recipe that an earlier
            version made.
        estimated_increase: of perplexity by the analysis; 0.01 is 1 %.
        perplexity_increase: measured on the held-out text, in the phase where it is more; None
            where the goal is a size and there was too little text.
        perplexity_increase_error: its standard error; None of one window.
        trials: how many choices were quantized and measured for it.
        moved: a sentence for each group without the scheme that is wanted most, the worst first.
    """

    result: Result
    recipe: Path
    groups: Mapping[str, int]
    bits: float
    bytes_per_token: int | None
    estimated_increase: float
    perplexity_increase: float | None
    perplexity_increase_error: float | None
    trials: int
    moved: tuple[str, ...] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """What the command prints of it."""
        found = {
            **self.result.outputs[0].as_json(),
            "recipe": str(self.recipe),
            "groups": dict(self.groups),
            "bits_per_weight": self.bits,
            "bytes_per_token": self.bytes_per_token,
            "estimated_increase": self.estimated_increase,
        }
        if self.perplexity_increase is not None:
            found["perplexity_increase"] = self.perplexity_increase
            found["perplexity_increase_error"] = self.perplexity_increase_error
            found["trials"] = self.trials
        return found


def quantize_mixed(
    model: str | PathLike[str],
    output: str | PathLike[str],
    choose: Sequence[str],
    *,
    calibration: str | PathLike[str],
    max_ppl_increase: float | None = None,
    target_bits: float | None = None,
    target_bytes_per_token: int | None = None,
    heldout: str | PathLike[str] | None = None,
    sensitivity: str | PathLike[str] | None = None,
    algorithm: str = DEFAULTS.algorithm,
    format: str = "",
    progress: StepProgress | None = None,
    scheme_options: Mapping[str, Any] | None = None,
    algorithm_options: Mapping[str, Any] | None = None,
    exclude: Sequence[str] = (),
    float_undivided: bool = False,
    kv_cache: str = DEFAULTS.kv_cache,
    smoothing_target: str = DEFAULTS.smoothing_target,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    tp: int | None = None,
    shard_bytes: int | None = None,
    job: str | PathLike[str] | None = None,
    keep_job: bool = False,
    any_environment: bool = False,
) -> MixedResult:
    """Makes a quantized checkpoint in which each group of linears has the scheme that pays.

    An analysis says what each scheme does to each group. One price over all groups then gives up
    precision where it costs least; with ``max_ppl_increase`` choices are quantized and measured on
    held-out text, and the cheapest that stays within the budget is kept. What was chosen is written
    as a recipe, ``OUTPUT.recipe.yaml``, which makes the same checkpoint by itself. Called again
    with the same arguments after a kill, it goes on where it stopped.

    Args:
        model: directory of a Hugging Face checkpoint.
        output: directory to make.
        choose: names of ``ms_quant.SCHEMES`` that one runtime mixes, and ``"FLOAT"`` if groups may
            stay float; the one that is wanted most first.
        calibration: file of calibration data (text, JSON records, .parquet or .npz).
        max_ppl_increase: by how much perplexity may grow, the standard error of what is measured
            included; 0.005 is 0.5 %. This or one of the next two.
        target_bits: stored bits of a weight in the mean over all groups, scales and all.
        target_bytes_per_token: what a step of decode may read of the weights for one token.
        heldout: the text that perplexity is measured on; None is other windows of the calibration
            data, and English prose and verse that come with the package.
        sensitivity: file of an analysis that was made before; None makes one.
        algorithm: names of ``ms_quant.ALGORITHMS``, joined with ``+``; each scheme is prepared by
            those that suit it.
        format: the checkpoint format; "" is the first in which a runtime serves all schemes.
        progress: told how far the steps are.
        scheme_options: options of the weights, for those schemes that take them.
        algorithm_options: options of the algorithms, ``{"gptq.damping": 0.02}``.
        exclude: glob patterns of linears that stay float; whole fused groups do.
        float_undivided: leave linears float that a scheme's groups do not divide.
        kv_cache: ``"float"``, or ``"C8"`` for int8 keys and values, scaled per channel; of latent
            attention for int8 queries and latent vectors, scaled by recall windows, or
            ``"C8_ABSMAX"``, by largest magnitudes.
        smoothing_target: where smoothing vectors go; "" is the format's first choice.
        samples: windows of calibration data, and of a held-out text at most; None is 64.
        seq_len: tokens of a window; None is 256.
        seed: seed of the choice of windows; None is 0.
        dtype: type of what stays float; None is the model's, and bfloat16 for float32.
        tp: tensor-parallel ranks that will serve the output; None is not known yet.
        shard_bytes: largest data size of an output file; None is 4 GiB.
        job: directory of the work in progress; None is the output's name with ``.job`` after it.
        keep_job: leave the job directory when all is done.
        any_environment: go on with a job that was begun under other versions, another kind of CPU
            or another number of threads.

    Returns:
        MixedResult: what was made, the recipe, and what it costs.

    Raises:
        MsQuantError: something that is asked for cannot be done, or no choice is within the budget.

    Examples:
        >>> import ms_quant
        >>> made = ms_quant.quantize_mixed(
        ...     "Qwen3-8B", "Qwen3-8B-mixed", ["W8A8", "FLOAT"], calibration="calib.txt",
        ...     target_bits=12.0, samples=8, seq_len=32,
        ... )
        >>> sorted(made.groups), made.bits <= 12
        (['FLOAT', 'W8A8'], True)
    """
    options = QuantizeOptions(
        model=Path(model),
        output=Path(output),
        algorithm=algorithm,
        scheme_options=scheme_options or {},
        algorithm_options=algorithm_options or {},
        float_undivided=float_undivided,
        kv_cache=kv_cache,
        smoothing_target=smoothing_target,
        calib=Path(calibration),
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        exclude=tuple(exclude),
        dtype=dtype,
        shard_bytes=shard_bytes,
        job=None if job is None else Path(job),
        keep_job=keep_job,
        any_environment=any_environment,
        formats=(format,) if format else (),
        tp=tp,
    )
    asked = MixedOptions(
        options,
        choose,
        max_ppl_increase,
        target_bits,
        None if heldout is None else Path(heldout),
        None if sensitivity is None else Path(sensitivity),
        target_bytes_per_token,
    )
    return run_mixed(prepare_mixed(asked), progress or silent)


def run_mixed(asked: CheckedMixed, progress: StepProgress = silent) -> MixedResult:
    """Does what was asked, or goes on with it.

    Raises:
        MsQuantError: no choice is within the budget, or the output or the recipe is of another
            request.
    """
    before = _recipe_before(asked)
    if before is not None and asked.options.job.output.is_dir():
        checked = prepare(plain_request(asked, before), model=asked.model)
        return _result(asked, _written(checked, progress), _MADE.validate_python(before.made))
    with working(asked.directory, keep=asked.options.job.keep_job):
        found = asked.sensitivity or _analyzed(asked, progress)
        trials = Trials(asked, progress)
        decision = decide(asked, found, trials)
        made = {"asked": asked.asked, **decision.facts(found, asked.options.choose)}
        checked = trials.job(decision.choice, made)
        assert checked.options.recipe is not None
        _write_recipe(asked, checked.options.recipe)
        result = _written(checked, progress)
    return _result(asked, result, _MADE.validate_python(made))


def _analyzed(asked: CheckedMixed, progress: StepProgress) -> Sensitivity:
    assert asked.analysis is not None
    blocks = asked.model.config.num_layers
    told = of_blocks(progress, ANALYZING, blocks)
    return run_analysis(asked.analysis, told, partial(progress, READING))


def _written(checked: CheckedJob, progress: StepProgress) -> Result:
    told = of_blocks(progress, QUANTIZING, checked.plan.config.num_layers)
    return run_job(checked.options, told, checked, partial(progress, READING))


def _recipe_before(asked: CheckedMixed) -> Recipe | None:
    """The recipe that the same request has made before.

    Raises:
        MsQuantError: there is one of another request, or an output without one.
    """
    path, output = asked.recipe_path, asked.options.job.output
    if path.exists():
        recipe = load_recipe(path)
        if recipe.made.get("asked") != asked.asked:
            raise JobConflictError(
                f"{path}: is the recipe of another request, expected another output, or delete it"
            )
        _check_made(recipe, path)
        return recipe
    if output.exists():
        raise JobConflictError(
            f"{output}: exists without the recipe {path.name} beside it, expected a new directory"
        )
    return None


def _write_recipe(asked: CheckedMixed, recipe: Recipe) -> None:
    job = asked.options.job
    header = (
        "# Made by ms-quant quantize --choose. It makes the same checkpoint again:\n"
        f"# ms-quant quantize MODEL --recipe {asked.recipe_path.name} -o OUTPUT"
    )
    again = {"dtype": job.dtype, "fold": job.smoothing_target, "tp": job.tp}
    header += "".join(f" --{name} {value}" for name, value in again.items() if value)
    header += " --float-undivided" if job.float_undivided else ""
    text = yaml.safe_dump(to_native(recipe), sort_keys=False, width=100)
    write_bytes(asked.recipe_path, f"{header}\n{text}".encode())


def _check_made(recipe: Recipe, path: Path) -> None:
    """Refuses what this command does not write there: someone has changed it."""
    try:
        _MADE.validate_python(recipe.made)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["made", *map(str, first["loc"])])
        found = "missing" if first["type"] == "missing" else f"{first['input']!r:.80}"
        raise BadFileError(
            f"{path}: {where:.200} is {found}, expected what this command has written; for a "
            "recipe that was changed use --recipe and another output, or delete it"
        ) from None


def _result(asked: CheckedMixed, result: Result, made: Made) -> MixedResult:
    return MixedResult(
        result,
        asked.recipe_path,
        made.groups,
        made.bits_per_weight,
        made.bytes_per_token,
        made.estimated_increase,
        made.perplexity_increase,
        made.perplexity_increase_error,
        made.trials,
        tuple(made.moved),
    )
