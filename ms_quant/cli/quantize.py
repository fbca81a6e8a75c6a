"""The command that quantizes a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ms_quant import kernels
from ms_quant.cli.arguments import ALPHA, SourceArgument
from ms_quant.cli.block_lines import BlockLines
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
from ms_quant.cli.diffusers import quantize_diffusers
from ms_quant.diffusers.directory import is_diffusers
from ms_quant.errors import BadArgumentError, MsQuantError
from ms_quant.pipeline.best import BEST, BEST_INCREASE
from ms_quant.pipeline.condensed import condensed
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.pipeline.options import (
    QuantizeOptions,
    read_recipe,
    refuse_beside_recipe,
    split_options,
)
from ms_quant.pipeline.parts import by_part
from ms_quant.pipeline.quantize import QUANTIZING, READING
from ms_quant.pipeline.request import prepare
from ms_quant.pipeline.run import run_job
from ms_quant.progress import of_blocks
from ms_quant.schemes.table import SCHEMES


def quantize(
    model: SourceArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")],
    scheme: Annotated[
        str | None,
        typer.Option(
            help="See [b]ms-quant schemes[/b]; or one for each part of the model: "
            "attention=W8A8,dense=W8A8_DYNAMIC,experts=W4A8_DYNAMIC (also shared, mtp; one "
            f"without a part is for the rest). Default: {DEFAULTS.scheme}"
        ),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="See [b]ms-quant schemes[/b]; joined with +: osl+gptq; or for each part, as with "
            "--scheme; or best, which keeps static schemes within "
            f"{BEST_INCREASE} of perplexity. Default: {DEFAULTS.algorithm}"
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
        str,
        typer.Option(
            help="float, or C8: int8 keys and values with static scales; of latent attention its "
            "queries and latent vectors, or C8_ABSMAX with scales of largest magnitudes."
        ),
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
    all_tokens: Annotated[
        bool,
        typer.Option(
            "--all-tokens",
            help="Show each routed expert all calibration tokens, not only those that go to it.",
        ),
    ] = False,
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
    choose: Annotated[
        str | None,
        typer.Option(
            help="Schemes with commas, and FLOAT: each group of linears gets the one that pays for "
            "the goal, see the next three."
        ),
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            help="By how much perplexity may grow, such as 0.5%, standard error included."
        ),
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Or: stored bits of a weight in the mean, such as 6.0.")
    ] = None,
    target_bytes_per_token: Annotated[
        str | None,
        typer.Option(
            help="Or: what decode may read of the weights for a token, head and norms included, "
            "such as 100MB or 4.5GiB."
        ),
    ] = None,
    heldout: Annotated[
        Path | None,
        typer.Option(
            help="Text that perplexity is measured on. Default: other windows of the calibration "
            "data, and prose and verse that come with the package"
        ),
    ] = None,
    sensitivity: Annotated[
        Path | None, typer.Option(help="What ms-quant analyze made of the model. Default: made now")
    ] = None,
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
        all_tokens=all_tokens,
        tp=tp,
    )
    if is_diffusers(model):
        goal = {"max-ppl-increase": max_ppl_increase, "target-bits": target_bits}
        mixed = {"choose": choose, "heldout": heldout, "sensitivity": sensitivity, "recipe": recipe}
        further = {**goal, "target-bytes-per-token": target_bytes_per_token, **mixed}
        quantize_diffusers(options, scheme, further, dry_run, as_json)
        return
    static = options.scheme in SCHEMES and SCHEMES[options.scheme].needs_calibration
    sized = target_bits is not None or target_bytes_per_token is not None
    if algorithm == BEST and static and not sized and not _has_experts(model):
        max_ppl_increase = max_ppl_increase or BEST_INCREASE
    goals = max_ppl_increase, target_bits, target_bytes_per_token
    with naming_leftovers(output, job, options.formats):
        if all(value is None for value in (choose, *goals, heldout, sensitivity)):
            _quantize(options, dry_run, as_json)
            return
        if choose is not None:
            _refuse("--choose says which schemes there are", scheme=scheme)
        _refuse("a goal chooses what each linear becomes", recipe=recipe)
        for name, text in (("scheme", options.scheme), ("algorithm", options.algorithm)):
            if by_part(name, text).named:
                _refuse("a goal chooses what each part becomes", **{name: text})
        names = [name.strip() for name in (choose or "").split(",") if name.strip()]
        asked = options, names, goals, heldout, sensitivity
        _quantize_mixed(*asked, dry_run=dry_run, as_json=as_json)


def _has_experts(model: Path) -> bool:
    """Whether a model has routed experts, which no budget gives up one by one."""
    from ms_quant.formats.source_kind import model_directory
    from ms_quant.models.config import load_config

    try:
        return load_config(model_directory(model), "quantization_config").routing is not None
    except MsQuantError:
        return False  # what is wrong with it is said where it is opened


def _refuse(reason: str, **said: Any) -> None:
    """Refuses options that something else decides."""
    for name, value in said.items():
        if value is not None:
            raise BadArgumentError(f"--{name.replace('_', '-')}: {reason}, expected one of the two")


def _quantize_mixed(
    options: QuantizeOptions,
    choose: list[str],
    goals: tuple[str | None, float | None, str | None],
    heldout: Path | None,
    sensitivity: Path | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    from ms_quant.allocation.increase import parse_share
    from ms_quant.allocation.size import parse_bytes
    from ms_quant.mixed_precision.request import MixedOptions, prepare_mixed
    from ms_quant.mixed_precision.run import run_mixed

    increase, bits, token_bytes = goals
    most = None if increase is None else parse_share(increase)
    read = None if token_bytes is None else parse_bytes(token_bytes, "target bytes per token")
    checked = prepare_mixed(MixedOptions(options, choose, most, bits, heldout, sensitivity, read))
    for line in dict.fromkeys(checked.notes):
        note(f"note: {line}")
    if dry_run:
        emit(checked.as_json(), as_json, show_fields)
        return
    if kernels.note():
        note(f"note: {kernels.note()}")
    with step_progress() as step:
        found = run_mixed(checked, step)
    for line in found.moved:
        note(f"note: {line}")
    for line in found.result.not_served_by:
        note(f"note: {line}")
    for line in found.result.outputs[0].warnings:
        note(f"warning: {line}")
    emit(found.as_json(), as_json, show_fields)


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
    blocks = checked.plan.config.num_blocks
    with step_progress() as step:
        result = run_job(
            options,
            of_blocks(step, QUANTIZING, blocks),
            checked,
            partial(step, READING),
            finished=BlockLines(step, QUANTIZING, checked.plan, checked.job),
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
        emit(result, as_json, _show)


def _show(result: dict[str, Any]) -> None:
    show_fields({**result, "float_linears": condensed(result["float_linears"])})
