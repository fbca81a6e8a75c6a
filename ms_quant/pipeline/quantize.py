"""A float checkpoint quantized by one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ms_quant.errors import BadArgumentError
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.pipeline.options import QuantizeOptions, read_recipe, refuse_beside_recipe
from ms_quant.pipeline.parts import as_text
from ms_quant.pipeline.request import prepare
from ms_quant.pipeline.result import Result
from ms_quant.pipeline.run import run_job
from ms_quant.progress import StepProgress, of_blocks, silent
from ms_quant.recipe import Recipe, load_recipe

READING, QUANTIZING = "reading the model", "quantizing"
IN_RECIPES = ("scheme", "algorithm", "scheme_options", "algorithm_options", "exclude", "kv_cache")


def quantize_checkpoint(
    model: str | PathLike[str],
    output: str | PathLike[str],
    scheme: str | Mapping[str, str] = DEFAULTS.scheme,
    *,
    algorithm: str | Mapping[str, str] = DEFAULTS.algorithm,
    recipe: Recipe | str | PathLike[str] | Mapping[str, Any] | None = None,
    calibration: str | PathLike[str] | None = None,
    formats: Sequence[str] = (),
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
    all_tokens: bool = False,
) -> Result:
    """Makes a quantized checkpoint of a float one, block by block in bounded memory.

    Called again with the same arguments after a kill, it goes on where it stopped; when all was
    done before, it only says so. What trains on calibration data (flatquant) needs MindSpore, which
    is far faster on a CPU after ``mindspore.runtime.launch_blocking()``.

    Args:
        model: directory of a Hugging Face checkpoint.
        output: directory to make. With several ``formats`` each gets a directory of its name in it.
        scheme: a name of ``ms_quant.SCHEMES``, or one for each part of the model:
            ``{"attention": "W8A8", "dense": "W8A8_DYNAMIC", "experts": "W4A8_DYNAMIC"}``, as text
            ``"attention=W8A8,..."``. Parts are ``attention``, ``dense``, ``shared``, ``experts``
            and ``mtp``; ``"FLOAT"`` leaves one as it is, and ``""`` names the rest.
        algorithm: names of ``ms_quant.ALGORITHMS``, joined with ``+``: ``"osl+gptq"``; or, as with
            schemes, some for each part.
        recipe: what becomes of which linear, in place of the scheme, the algorithm, their options,
            ``exclude`` and ``kv_cache``: a Recipe, what a recipe file would hold, or the path of
            one.
        calibration: file of calibration data (text, JSON records, .parquet or .npz), which static
            schemes and most algorithms need.
        formats: checkpoint formats to make, which share one calibration; () is the first that the
            scheme is served in.
        progress: told how far the steps ``"reading the model"`` and ``"quantizing"`` are.
        scheme_options: options of the scheme's weights: ``{"group_size": 64, "symmetric": False}``.
        algorithm_options: options of the algorithms: ``{"alpha": 0.7}``; those of one of several by
            full name, ``{"gptq.damping": 0.01}``.
        exclude: glob patterns of linears that stay float; whole fused groups do.
        float_undivided: leave linears float that groups do not divide or the format's runtime fails
            on, instead of refusing.
        kv_cache: ``"float"``, or ``"C8"`` for int8 keys and values, scaled per channel; of latent
            attention for int8 queries and latent vectors, scaled by recall windows, or
            ``"C8_ABSMAX"``, by largest magnitudes.
        smoothing_target: where smoothing vectors go: ``"input-scale"``, ``"norm"`` or
            ``"mul-scale"``; "" is the format's first choice.
        samples: windows of calibration data; None is as the recipe says, else 64.
        seq_len: tokens of a window; None is as the recipe says, else 256.
        seed: seed of the choice of windows; None is as the recipe says, else 0.
        dtype: type of what stays float, ``"bfloat16"`` or ``"float16"``; None is the model's, and
            bfloat16 for float32.
        tp: tensor-parallel ranks that will serve the output, which is checked now; None is not
            known yet.
        shard_bytes: largest data size of an output file; None is as the recipe says, else 4 GiB.
        job: directory of the work in progress; None is the output's name with ``.job`` after it.
        keep_job: leave the job directory when all is done.
        any_environment: go on with a job that was begun under other versions, another kind of CPU
            or another number of threads.
        all_tokens: each routed expert is seen on all calibration tokens; else on those that go to
            it, and on others only where these are fewer than 64.

    Returns:
        Result: what was made in each format, what was chosen for each group of linears and how long
        that took, and what to know about it.

    Raises:
        MsQuantError: something that is asked for cannot be done, which is found before the work
            begins; or a value of the model or the data is not finite. No output is left behind.

    Examples:
        >>> import ms_quant
        >>> result = ms_quant.quantize_checkpoint(
        ...     "Qwen3-8B", "Qwen3-8B-W8A8", algorithm="smoothquant", calibration="calib.txt",
        ...     samples=8, seq_len=32, algorithm_options={"alpha": 0.7},
        ... )
        >>> result.outputs[0].format, result.outputs[0].quantized_linears
        ('golden-stick', 14)
        >>> result.outputs[0].report[0].group, result.outputs[0].report[0].chosen
        ('model.layers.0.qkv', {'alpha': 0.7})
        >>> # The same linears for two runtimes, from one calibration.
        >>> result = ms_quant.quantize_checkpoint(
        ...     "Qwen3-8B", "both", "W8A8", calibration="calib.txt", seq_len=32,
        ...     formats=["golden-stick", "ascend"],
        ... )
        >>> [str(output.path) for output in result.outputs]
        ['both/golden-stick', 'both/ascend']
    """
    options = QuantizeOptions(
        model=Path(model),
        output=Path(output),
        scheme=as_text(scheme),
        algorithm=as_text(algorithm),
        scheme_options=scheme_options or {},
        algorithm_options=algorithm_options or {},
        float_undivided=float_undivided,
        kv_cache=kv_cache,
        smoothing_target=smoothing_target,
        calib=None if calibration is None else Path(calibration),
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        exclude=_strings("exclude", exclude),
        dtype=dtype,
        shard_bytes=shard_bytes,
        job=None if job is None else Path(job),
        keep_job=keep_job,
        any_environment=any_environment,
        all_tokens=all_tokens,
        recipe=None if recipe is None else _recipe(recipe),
        formats=_strings("formats", formats),
        tp=tp,
    )
    if options.recipe is not None:
        usual = QuantizeOptions(options.model, options.output)
        values = {name: (getattr(options, name), getattr(usual, name)) for name in IN_RECIPES}
        given = {name: one for name, (one, other) in values.items() if one != other}
        refuse_beside_recipe("the recipe", given)
    checked, told = prepare(options), progress or silent
    return run_job(
        options,
        of_blocks(told, QUANTIZING, checked.plan.config.num_blocks),
        checked,
        lambda part: told(READING, part),
    )


def _strings(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """A list of strings; a single one, which is a sequence too, is refused.

    Raises:
        MsQuantError: it is a string.
    """
    if isinstance(values, str):
        raise BadArgumentError(f"{name} is {values!r:.80}, expected a list of strings")
    return tuple(values)


def _recipe(given: Recipe | str | PathLike[str] | Mapping[str, Any]) -> Recipe:
    if isinstance(given, Recipe):
        return given
    return load_recipe(given) if isinstance(given, Mapping) else read_recipe(Path(given))
