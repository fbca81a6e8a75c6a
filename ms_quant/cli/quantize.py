"""The command that quantizes a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ms_quant import kernels
from ms_quant.cli.arguments import ALPHA, ModelArgument
from ms_quant.cli.console import (
    AnyEnvironmentOption,
    CalibOption,
    DtypeOption,
    JobOption,
    JsonOption,
    KeepJobOption,
    SamplesOption,
    SeedOption,
    emit,
    human_bytes,
    naming_leftovers,
    note,
    show_fields,
    step_progress,
    use_mindspore,
)
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.pipeline.options import (
    QuantizeOptions,
    read_recipe,
    refuse_beside_recipe,
    split_options,
)
from ms_quant.pipeline.quantize import QUANTIZING, READING
from ms_quant.pipeline.request import prepare
from ms_quant.pipeline.run import run_job
from ms_quant.progress import of_blocks


def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")],
    scheme: Annotated[
        str | None, typer.Option(help=f"See [b]ms-quant schemes[/b]. Default: {DEFAULTS.scheme}")
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="See [b]ms-quant schemes[/b]; joined with +: osl+gptq. "
            f"Default: {DEFAULTS.algorithm}"
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="YAML that says what each linear becomes, ours or msModelSlim's."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a weight scale; 0 is per channel.", min=0)
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Weights without zero points.")
    ] = None,
    float_undivided: Annotated[
        bool,
        typer.Option(
            "--float-undivided",
            help="Leave linears float that groups do not divide or the format's runtime fails on.",
        ),
    ] = False,
    kv_cache: Annotated[
        str, typer.Option(help="float, or C8: int8 keys and values, scaled per channel.")
    ] = DEFAULTS.kv_cache,
    format: Annotated[
        list[str] | None,
        typer.Option(help="Checkpoint format; several share one calibration. Default: one served"),
    ] = None,
    smoothing_target: Annotated[
        str,
        typer.Option("--fold", help="Target of smoothing: input-scale, norm or mul-scale."),
    ] = DEFAULTS.smoothing_target,
    alpha: Annotated[
        float | None, typer.Option(help=f"Smoothing strength of smoothquant. Default: {ALPHA}")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another option of the scheme or algorithm, NAME=VALUE."),
    ] = None,
    calib: CalibOption = None,
    samples: SamplesOption = None,
    seq_len: Annotated[
        int | None, typer.Option(help=f"Tokens of a window. Default: {DEFAULTS.seq_len}", min=1)
    ] = None,
    seed: SeedOption = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Glob pattern of linears that stay float; whole fused groups do."),
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option(help="Tensor-parallel ranks that will serve it: checked now.", min=1),
    ] = None,
    dtype: DtypeOption = None,
    shard_bytes: Annotated[
        int | None,
        typer.Option(
            help=f"Largest output file. Default: {human_bytes(DEFAULTS.shard_bytes)}", min=1
        ),
    ] = None,
    job: JobOption = None,
    keep_job: KeepJobOption = False,
    any_environment: AnyEnvironmentOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, do nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a quantized checkpoint. Started again after a kill, it goes on where it stopped."""
    named = {"alpha": alpha, "group_size": group_size, "symmetric": symmetric}
    if recipe is not None:
        said = {"scheme": scheme, "algorithm": algorithm, **named, "set": setting}
        kept = {"exclude": exclude, "kv-cache": None if kv_cache == DEFAULTS.kv_cache else kv_cache}
        given = {f"--{name.replace('_', '-')}": value for name, value in {**said, **kept}.items()}
        refuse_beside_recipe(recipe, given)
    options = QuantizeOptions(
        model=model,
        output=output,
        scheme=scheme or DEFAULTS.scheme,
        algorithm=algorithm or DEFAULTS.algorithm,
        **split_options(named, setting or []),
        float_undivided=float_undivided,
        kv_cache=kv_cache,
        smoothing_target=smoothing_target,
        recipe=None if recipe is None else read_recipe(recipe),
        formats=tuple(format or ()),
        calib=calib,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        exclude=tuple(exclude or ()),
        dtype=dtype,
        shard_bytes=shard_bytes,
        job=job,
        keep_job=keep_job,
        any_environment=any_environment,
        tp=tp,
    )
    with naming_leftovers(output, job, options.formats):
        _quantize(options, dry_run, as_json)


def _quantize(options: QuantizeOptions, dry_run: bool, as_json: bool) -> None:
    checked = prepare(options)
    for line in dict.fromkeys(line for request in checked.all for line in request.notes):
        note(f"note: {line}")
    if dry_run:
        from ms_quant.pipeline.estimate import estimate

        _emit_all([estimate(p, p.options.output) for p in checked.all], as_json)
        return
    if any(request.plan.any("trains") for request in checked.all):
        use_mindspore()
    if checked.tokens is not None and kernels.note():
        note(f"note: {kernels.note()}")
    blocks = checked.plan.config.num_layers
    with step_progress() as step:
        result = run_job(
            options, of_blocks(step, QUANTIZING, blocks), checked, partial(step, READING)
        )
    for line in result.not_served_by:
        note(f"note: {line}")
    for line in dict.fromkeys(text for output in result.outputs for text in output.warnings):
        note(f"warning: {line}")
    _emit_all([output.as_json() for output in result.outputs], as_json)


def _emit_all(results: list[dict[str, Any]], as_json: bool) -> None:
    """What was made, or would be: of several formats one after the other."""
    if len(results) > 1 and as_json:
        emit({"formats": results}, as_json, show_fields)
        return
    for result in results:
        emit(result, as_json, show_fields)
