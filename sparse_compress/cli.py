"""The sparse-compress command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from ms_quant import __version__
from ms_quant.cli.console import (
    JsonOption,
    emit,
    exit_if_problems,
    given_model,
    naming_leftovers,
    note,
    show_fields,
    step_progress,
)
from ms_quant.cli.console import run as run_app
from ms_quant.cli.arguments import ModelArgument, example
from ms_quant.models.names import short_name
from sparse_compress.codec import CORES, backend_note
from sparse_compress.layouts import DEFAULT, TARGETS
from sparse_compress.layouts.msmodelslim import TARGET as SLIM_TARGET
from sparse_compress.pipeline.request import SparseOptions, check
from sparse_compress.rate.goal import parse_share

app = typer.Typer(
    help="Make W8A8SC checkpoints for the Atlas 300I Duo, on any machine, and prove them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
WorkersOption = Annotated[
    int, typer.Option(help="Threads that code one tensor.", min=1, show_default="all cores")
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan, do nothing.")]
CheckpointArgument = Annotated[
    Path, typer.Argument(help="Directory of a compressed checkpoint.", callback=given_model)
]


@app.command(
    epilog=example(
        "sparse-compress run Qwen3-8B -o Qwen3-8B-W8A8SC --target-ratio 0.45 --calib text.jsonl"
    )
)
def run(
    model: ModelArgument,
    output: OutputOption,
    calib: Annotated[
        Path, typer.Option(help="Calibration data: text, JSON records, .parquet, .npz.")
    ],
    target: Annotated[
        str, typer.Option(help=f"Runtime that it is for: {', '.join(TARGETS)}.")
    ] = DEFAULT,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.", min=1)] = 2,
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
        float | None, typer.Option(help="Or: share of weights to prune. Default: 0.5")
    ] = None,
    pruning: Annotated[
        str | None,
        typer.Option(help="activation: |W| * ||X||; magnitude: |W|. Default: activation"),
    ] = None,
    algorithm: Annotated[str, typer.Option(help="minmax, smoothquant or osl.")] = "minmax",
    alpha: Annotated[
        float | None, typer.Option(help="Smoothing strength of smoothquant. Default: 0.5")
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration data.", min=1)] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.", min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the choice of windows.", min=0)] = 0,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Glob pattern of linears that stay float16; whole fused groups do."),
    ] = None,
    job: Annotated[Path | None, typer.Option(help="Job directory. Default: OUTPUT.job")] = None,
    keep_job: Annotated[bool, typer.Option("--keep-job", help="Leave the job directory.")] = False,
    any_environment: Annotated[
        bool,
        typer.Option("--any-environment", help="Resume under other versions, CPU or threads."),
    ] = False,
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

    request = check(options)
    for line in (*request.checked.notes, *request.not_served_by):
        note(f"note: {line}")
    if dry_run:
        from sparse_compress.pipeline.estimate import estimate

        emit(estimate(request), as_json, show_fields)
        return
    _note_backend()
    with step_progress() as progress:
        result = compress(options, progress, request)
    for name, reason in result["uncompressed"].items():
        note(f"note: {name} stays float16: {reason}")
    if result["ratio"] > (options.target_ratio or 1):
        note(
            f"note: the ratio is {result['ratio']:.4f}, above the target: it is predicted without "
            "the padding of slices whose rows are not a multiple of 128"
        )
    emit(result, as_json, show_fields)


@app.command(epilog=example("sparse-compress compress Qwen3-8B-W8A8S -o Qwen3-8B-W8A8SC"))
def compress(
    directory: Annotated[
        Path,
        typer.Argument(
            help="W8A8S or W16A16S directory as msModelSlim writes it.", callback=given_model
        ),
    ],
    output: OutputOption,
    target: Annotated[
        str, typer.Option(help="msmodelslim: any model; or, of known families, a runtime.")
    ] = SLIM_TARGET.name,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks of a runtime.", min=1)] = 1,
    workers: WorkersOption = CORES,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Code the weights of a quantized directory into UNZIP tiles.

    Started again after a kill, it goes on where it stopped.
    """
    from sparse_compress.msmodelslim.compress import check as check_directory
    from sparse_compress.msmodelslim.compress import compress as code

    with naming_leftovers(output):
        request = check_directory(directory, output, workers, target, tp)
        if dry_run:
            emit(request.plan(), as_json, show_fields)
            return
        _note_backend()
        with step_progress() as progress:
            result = code(request, progress)
    for name, reason in result["uncompressed"].items():
        note(f"note: {name} stays as it is: {reason}")
    emit(result, as_json, show_fields)


@app.command(epilog=example("sparse-compress decompress Qwen3-8B-W8A8SC -o Qwen3-8B-W8A8S"))
def decompress(
    checkpoint: CheckpointArgument,
    output: OutputOption,
    workers: WorkersOption = CORES,
    as_json: JsonOption = False,
) -> None:
    """Restore the quantized weights, bit for bit, in one directory as msModelSlim writes it.

    Started again after a kill, it goes on where it stopped.
    """
    from sparse_compress.msmodelslim.decompress import check as check_checkpoint
    from sparse_compress.msmodelslim.decompress import decompress as restore

    with naming_leftovers(output):
        request = check_checkpoint(checkpoint, output, workers)
        _note_backend()
        with step_progress() as progress:
            result = restore(request, progress)
    emit(result, as_json, show_fields)


@app.command(epilog=example("sparse-compress verify Qwen3-8B-W8A8SC --source Qwen3-8B"))
def verify(
    checkpoint: CheckpointArgument,
    source: Annotated[
        Path | None,
        typer.Option(help="The checkpoint it was made from.", callback=given_model),
    ] = None,
    workers: WorkersOption = CORES,
    as_json: JsonOption = False,
) -> None:
    """Decode every tile and check every tensor; with the source, every weight against it.

    Pruned weights are made again, bit for bit; rounded ones are measured against the source.
    """
    from sparse_compress.verify.checkpoint import verify as prove

    _note_backend()
    with step_progress() as progress:
        result = prove(checkpoint, source, progress, workers)
    emit(result, as_json, _show_verification)
    exit_if_problems(result["problems"])


@app.command(epilog=example("sparse-compress info Qwen3-8B-W8A8SC --plot layers.html"))
def info(
    checkpoint: CheckpointArgument,
    plot: Annotated[
        Path | None,
        typer.Option(help="HTML page to make: sizes, entropy bounds, histograms. Needs plotly."),
    ] = None,
    workers: WorkersOption = CORES,
    as_json: JsonOption = False,
) -> None:
    """A table of layers: shape, sparsity, size and ratio on each rank."""
    from sparse_compress.pipeline.info import info as describe

    emit(describe(checkpoint, plot, workers), as_json, _show_info)


def _note_backend() -> None:
    """Says so, once, when the slow codec is at work."""
    if backend_note():
        note(f"note: {backend_note()}")


def _show_verification(result: dict[str, Any]) -> None:
    for problem in result["problems"]:
        print(problem)
    if not result["problems"]:
        show_fields(
            {key: value for key, value in result.items() if key not in ("problems", "notes")}
        )
        print("right: every check passed")
    for text in result["notes"]:
        note(f"note: {text}")


def _show_info(result: dict[str, Any]) -> None:
    numbers = ("rank", "shape", "zeros", "raw", "stored", "ratio", "bypass")
    columns = [Column(name, justify="right", no_wrap=True) for name in numbers]
    table = Table(Column("layer", overflow="fold"), *columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in result.pop("rows"):
        table.add_row(
            short_name(row["layer"]),
            str(row["rank"]),
            "x".join(map(str, row["shape"])),
            f"{100 * row['sparsity']:.1f} %",
            f"{row['raw_bytes']:,}",
            f"{row['stored_bytes']:,}",
            f"{row['ratio']:.3f}",
            f"{row['bypass_tiles']}/{row['tiles']}",
        )
    Console().print(table)
    show_fields(result)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"sparse-compress {__version__}")
        raise typer.Exit


def main() -> None:
    run_app(app)
