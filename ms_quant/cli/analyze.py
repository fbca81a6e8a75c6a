"""The command that finds what hurts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ms_quant import kernels
from ms_quant.cli.arguments import ModelArgument
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
    naming_leftovers,
    note,
    step_progress,
)
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.pipeline.options import QuantizeOptions, split_options
from ms_quant.pipeline.quantize import READING
from ms_quant.progress import of_blocks

if TYPE_CHECKING:
    from ms_quant.analysis.records import Sensitivity
    from ms_quant.analysis.request import AnalyzeOptions


def analyze(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to make.")],
    calib: CalibOption = None,
    schemes: Annotated[
        str,
        typer.Option(
            help="Names with commas, see [b]ms-quant schemes[/b]; C8 and C8_DYNAMIC are the cache "
            "of keys and values."
        ),
    ] = DEFAULTS.scheme,
    algorithm: Annotated[
        str,
        typer.Option(help="Joined with +: quarot+osl. Each scheme takes those that suit it."),
    ] = DEFAULTS.algorithm,
    metric: Annotated[
        str,
        typer.Option(
            help="What the tables are sorted by: loss_increase, block_error, block_mse, "
            "output_error, output_mse, or of the input std, quantile, kurtosis."
        ),
    ] = "loss_increase",
    top: Annotated[int, typer.Option(help="Groups that a table lists.", min=1)] = 10,
    plot: Annotated[
        Path | None, typer.Option(help="HTML page to make, too: blocks by groups.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Inputs that share a weight scale, where a scheme takes it.", min=0),
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Weights without zero points.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="Checkpoint format whose numerics count. Default: each one's first")
    ] = "",
    samples: SamplesOption = None,
    seq_len: Annotated[
        int | None, typer.Option(help=f"Tokens of a window. Default: {DEFAULTS.seq_len}", min=2)
    ] = None,
    seed: SeedOption = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="An option of an algorithm, NAME=VALUE.")
    ] = None,
    probe_tokens: Annotated[
        int | None,
        typer.Option(
            help="About how many tokens one quantized group at a time runs on. Default: as many as "
            "cost a quarter of calibration, 16 at least",
            min=1,
        ),
    ] = None,
    dtype: DtypeOption = None,
    job: JobOption = None,
    keep_job: KeepJobOption = False,
    any_environment: AnyEnvironmentOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find what hurts: what each group of linears costs in each scheme, from one calibration."""
    from ms_quant.analysis.page import check_page, write_page
    from ms_quant.analysis.records import check_metric
    from ms_quant.analysis.request import AnalyzeOptions
    from ms_quant.analysis.summary import summary

    check_metric(metric)
    if plot is not None:
        check_page(plot)
    chosen = {"group_size": group_size, "symmetric": symmetric}
    options = QuantizeOptions(
        model=model,
        output=output,
        algorithm=algorithm,
        **split_options(chosen, setting or []),
        calib=calib,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        dtype=dtype,
        job=job,
        keep_job=keep_job,
        any_environment=any_environment,
    )
    names = [name.strip() for name in schemes.split(",") if name.strip()]
    with naming_leftovers(output, job):
        found = _analyzed(AnalyzeOptions(options, names, format, probe_tokens))
    if plot is not None:
        write_page(plot, found, metric)
    made: dict[str, Any] = {"output": str(output), "plot": None if plot is None else str(plot)}
    emit(made | found.as_json(), as_json, lambda _: print("\n".join(summary(found, metric, top))))


def _analyzed(options: AnalyzeOptions) -> Sensitivity:
    from ms_quant.analysis.request import prepare_analysis
    from ms_quant.analysis.run import ANALYZING, run_analysis

    checked = prepare_analysis(options)
    for line in checked.notes:
        note(f"note: {line}")
    if kernels.note():
        note(f"note: {kernels.note()}")
    with step_progress() as step:
        blocks = of_blocks(step, ANALYZING, checked.checked.plan.config.num_layers)
        return run_analysis(checked, blocks, partial(step, READING))
