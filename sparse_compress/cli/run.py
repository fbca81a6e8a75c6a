"""The command that makes a W8A8SC checkpoint of a float one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ms_quant.allocation.increase import parse_share
from ms_quant.cli.arguments import ALPHA, ModelArgument
from ms_quant.cli.console import (
    AnyEnvironmentOption,
    JobOption,
    JsonOption,
    KeepJobOption,
    emit,
    naming_leftovers,
    note,
    show_fields,
    step_progress,
)
from ms_quant.pipeline.defaults import DEFAULTS
from sparse_compress.cli.arguments import DryRunOption, OutputOption, WorkersOption, note_backend
from sparse_compress.codec import CORES
from sparse_compress.layouts import DEFAULT, TARGETS
from sparse_compress.pipeline.request import TP, SparseOptions, check
from sparse_compress.rate.prune import PRUNINGS, SPARSITY


def run(
    model: ModelArgument,
    output: OutputOption,
    calib: Annotated[
        Path, typer.Option(help="Calibration data: text, JSON records, .parquet, .npz.")
    ],
    target: Annotated[
        str, typer.Option(help=f"Runtime that it is for: {', '.join(TARGETS)}.")
    ] = DEFAULT,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.", min=1)] = TP,
    target_ratio: Annotated[
        float | None,
        typer.Option(help="Size to reach, such as 0.45: weights are rounded for error and size."),
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(help="Or: by how much perplexity may grow, such as 0.5%. Needs --heldout."),
    ] = None,
    heldout: Annotated[
        Path | None,
        typer.Option(help="Text whose first --samples windows that perplexity is measured on."),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help=f"Or: share of weights to prune. Default: {SPARSITY}")
    ] = None,
    pruning: Annotated[
        str | None,
        typer.Option(help=f"activation: |W| * ||X||; magnitude: |W|. Default: {PRUNINGS[0]}"),
    ] = None,
    algorithm: Annotated[
        str, typer.Option(help="minmax, smoothquant or osl.")
    ] = DEFAULTS.algorithm,
    alpha: Annotated[
        float | None, typer.Option(help=f"Smoothing strength of smoothquant. Default: {ALPHA}")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Windows of calibration data.", min=1)
    ] = DEFAULTS.samples,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.", min=1)] = DEFAULTS.seq_len,
    seed: Annotated[
        int, typer.Option(help="Seed of the choice of windows.", min=0)
    ] = DEFAULTS.seed,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Glob pattern of linears that stay float16; whole fused groups do."),
    ] = None,
    job: JobOption = None,
    keep_job: KeepJobOption = False,
    any_environment: AnyEnvironmentOption = False,
    workers: WorkersOption = CORES,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make W8A8 weights that code well, slice them for tensor parallelism and code them.

    Weights are rounded for a size or a loss of quality, or pruned.

    Started again after a kill, it goes on where it stopped.
    """
    options = SparseOptions(
        model=model,
        output=output,
        calib=calib,
        target=target,
        tp=tp,
        target_ratio=target_ratio,
        max_ppl_increase=None if max_ppl_increase is None else parse_share(max_ppl_increase),
        heldout=heldout,
        sparsity=sparsity,
        pruning=pruning,
        algorithm=algorithm,
        alpha=alpha,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        exclude=tuple(exclude or ()),
        job=job,
        keep_job=keep_job,
        any_environment=any_environment,
        workers=workers,
    )
    with naming_leftovers(output, job):
        _run(options, dry_run, as_json)


def _run(options: SparseOptions, dry_run: bool, as_json: bool) -> None:
    from sparse_compress.pipeline.run import run as compress

    checked = check(options)
    for line in (*checked.quantization.notes, *checked.not_served_by):
        note(f"note: {line}")
    if dry_run:
        from sparse_compress.pipeline.estimate import estimate

        emit(estimate(checked), as_json, show_fields)
        return
    note_backend()
    with step_progress() as progress:
        result = compress(options, progress, checked)
    for name, reason in result.uncompressed.items():
        note(f"note: {name} stays float16: {reason}")
    if result.ratio > (options.target_ratio or 1):
        note(
            f"note: the ratio is {result.ratio:.4f}, above the target: it is predicted without "
            "the padding of slices whose rows are not a multiple of 128"
        )
    emit(result.as_json(), as_json, show_fields)
