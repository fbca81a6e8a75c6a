"""The ms-quant command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from ms_quant import __version__, kernels
from ms_quant.cli.console import (
    JsonOption,
    block_progress,
    emit,
    exit_if_problems,
    given_model,
    human_bytes,
    naming_leftovers,
    note,
    run,
    show_fields,
    step_progress,
    use_mindspore,
)
from ms_quant.errors import MsQuantError
from ms_quant.pipeline.request import (
    QuantizeOptions,
    prepare,
    read_recipe,
    refuse_beside_recipe,
    split_options,
)
from ms_quant.pipeline.run import quantize_checkpoint
from ms_quant.schemes.storage import FormatSupport
from ms_quant.schemes.table import FLOAT_CACHE

app = typer.Typer(
    help="Quantize language models for Ascend, on any machine, and prove the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
ModelArgument = Annotated[
    Path, typer.Argument(help="Directory of a Hugging Face checkpoint.", callback=given_model)
]
CacheOption = Annotated[
    str | None,
    typer.Option(help="float, C8 or C8_DYNAMIC. Default: as the checkpoint says"),
]
CheckpointArgument = Annotated[
    Path, typer.Argument(help="Directory of a checkpoint.", callback=given_model)
]


def example(line: str) -> str:
    return f"Example:  {line}"


@app.command(
    epilog=example("ms-quant quantize Qwen3-8B -o Qwen3-8B-W8A8 --algorithm osl --calib text.jsonl")
)
def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")],
    scheme: Annotated[
        str | None, typer.Option(help="See [b]ms-quant schemes[/b]. Default: W8A8")
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(help="See [b]ms-quant schemes[/b]; joined with +: osl+gptq. Default: minmax"),
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
    ] = FLOAT_CACHE,
    format: Annotated[
        list[str] | None,
        typer.Option(help="Checkpoint format; several share one calibration. Default: one served"),
    ] = None,
    fold: Annotated[
        str, typer.Option(help="Where smoothing goes: input-scale, norm or mul-scale.")
    ] = "",
    alpha: Annotated[
        float | None, typer.Option(help="Smoothing strength of smoothquant. Default: 0.5")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another option of the scheme or algorithm, NAME=VALUE."),
    ] = None,
    calib: Annotated[
        Path | None, typer.Option(help="Calibration data: text, JSON records, .parquet, .npz.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Windows of calibration data. Default: 64", min=1)
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a window. Default: 256", min=1)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the choice of windows. Default: 0", min=0)
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Glob pattern of linears that stay float; whole fused groups do."),
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option(help="Tensor-parallel ranks that will serve it: checked now.", min=1),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of what stays float: bfloat16 or float16.")
    ] = None,
    shard_bytes: Annotated[
        int | None, typer.Option(help="Largest output file. Default: 4 GiB", min=1)
    ] = None,
    job: Annotated[Path | None, typer.Option(help="Job directory. Default: OUTPUT.job")] = None,
    keep_job: Annotated[bool, typer.Option("--keep-job", help="Leave the job directory.")] = False,
    any_environment: Annotated[
        bool,
        typer.Option("--any-environment", help="Resume under other versions, CPU or threads."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, do nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a quantized checkpoint. Started again after a kill, it goes on where it stopped."""
    named = {"alpha": alpha, "group_size": group_size, "symmetric": symmetric}
    if recipe is not None:
        said = {"scheme": scheme, "algorithm": algorithm, **named, "set": setting}
        kept = {"exclude": exclude, "kv-cache": None if kv_cache == FLOAT_CACHE else kv_cache}
        refuse_beside_recipe(recipe, {**said, **kept})
    options = QuantizeOptions(
        model=model,
        output=output,
        scheme=scheme or "W8A8",
        algorithm=algorithm or "minmax",
        **split_options(named, setting or []),
        float_undivided=float_undivided,
        kv_cache="" if kv_cache == FLOAT_CACHE else kv_cache,
        fold=fold,
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
        result = quantize_checkpoint(
            options,
            lambda index, part: step("quantizing", (index + part) / blocks),
            checked,
            lambda part: step("reading the model", part),
        )
    results = result.get("formats", [result])
    for line in dict.fromkeys(line for one in results for line in one["not_served_by"]):
        note(f"note: {line}")
    _emit_all(results, as_json)


def _emit_all(results: list[dict[str, Any]], as_json: bool) -> None:
    """What was made, or would be: of several formats one after the other."""
    if len(results) > 1 and as_json:
        emit({"formats": results}, as_json, show_fields)
        return
    for result in results:
        emit(result, as_json, show_fields)


@app.command(epilog=example("ms-quant convert Qwen3-8B-dynamic -o Qwen3-8B-ascend --format ascend"))
def convert(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")],
    format: Annotated[str, typer.Option(help="The other format, see [b]ms-quant schemes[/b].")],
    shard_bytes: Annotated[
        int | None, typer.Option(help="Largest output file. Default: as it was made", min=1)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The same numbers in another format, or why it cannot hold them."""
    from ms_quant.pipeline.convert import convert_checkpoint

    with naming_leftovers(output), step_progress() as step:
        result = convert_checkpoint(
            checkpoint,
            output,
            format,
            shard_bytes=shard_bytes,
            progress=lambda part: step("converting", part),
        )
    for line in result["not_served_by"]:
        note(f"note: {line}")
    emit(result, as_json, show_fields)


@app.command(epilog=example("ms-quant verify Qwen3-8B-W8A8 --source Qwen3-8B"))
def verify(
    checkpoint: CheckpointArgument,
    source: Annotated[
        Path | None,
        typer.Option(help="The float checkpoint it was made from.", callback=given_model),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove a quantized checkpoint: names, types, shapes, description, scales, hashes."""
    from ms_quant.verify.checkpoint import verify_checkpoint

    result = verify_checkpoint(checkpoint, source)
    emit(result, as_json, _show_verification)
    exit_if_problems(result["problems"])


@app.command(
    "serve-check",
    epilog=example("ms-quant serve-check Qwen3-8B-W8A8SC --runtime vllm-mindspore --tp 2"),
)
def serve_check(
    checkpoint: CheckpointArgument,
    runtime: Annotated[str, typer.Option(help="vllm-mindspore, vllm-ascend or mindie.")],
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.", min=1)] = 1,
    device: Annotated[
        str, typer.Option(help="310p or 910b. Default: what such checkpoints are made for")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """What a runtime would load how, and the command that serves it; or why it would not."""
    from ms_quant.serve.check import serve_check as check

    result = check(checkpoint, runtime, tp, device.lower())
    emit(result, as_json, _show_serving)
    exit_if_problems(result["problems"])


@app.command("eval", epilog=example("ms-quant eval Qwen3-8B-W8A8 --text heldout.txt"))
def evaluate(
    checkpoint: CheckpointArgument,
    text: Annotated[Path, typer.Option(help="Text, JSON records, .parquet or .npz to predict.")],
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 256,
    windows: Annotated[int | None, typer.Option(help="Use only the first windows.", min=1)] = None,
    kv_cache: CacheOption = None,
    float16: Annotated[
        bool, typer.Option("--float16", help="Also as a runtime computes that has float16 alone.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a float or quantized checkpoint."""
    from ms_quant.data.calibration import eval_windows
    from ms_quant.evaluation.perplexity import perplexity
    from ms_quant.formats.inspection import cache_name
    from ms_quant.formats.opening import open_model

    model = open_model(checkpoint)
    _note_oddities(model)
    tokens = eval_windows(text, checkpoint, seq_len, windows)
    with block_progress("evaluating", model.config.num_layers) as progress:
        measured = perplexity(model, tokens, progress, kv_cache=kv_cache)
    if model.phased:
        with block_progress("evaluating decode", model.config.num_layers) as progress:
            decoded = perplexity(model, tokens, progress, decode=True, kv_cache=kv_cache)
        measured["perplexity_decode"] = decoded["perplexity"]
        measured["loss_decode"] = decoded["loss"]
    problems = []
    if float16:
        from ms_quant.evaluation.float16_forward import Float16OverflowError

        try:
            with block_progress("evaluating float16", model.config.num_layers) as progress:
                narrow = perplexity(model, tokens, progress, float16=True)
            measured["perplexity_float16"] = narrow["perplexity"]
            measured["loss_float16"] = narrow["loss"]
        except Float16OverflowError as error:
            problems.append(str(error))
            measured["float16_overflow"] = str(error)
    emit(
        {
            "checkpoint": str(checkpoint),
            "format": model.format,
            "kv_cache": kv_cache or cache_name(model),
            **measured,
        },
        as_json,
        show_fields,
    )
    exit_if_problems(problems)


def _note_oddities(model: Any) -> None:
    """What is wrong or odd in the files of a checkpoint that can be read all the same."""
    structure = getattr(model, "structure", None)
    for text in [*structure.defects, *structure.notes] if structure else []:
        note(f"note: {text}")


@app.command(epilog=example('ms-quant generate Qwen3-8B-W8A8 --prompt "The capital of France"'))
def generate(
    checkpoint: CheckpointArgument,
    prompt: Annotated[str, typer.Option(help="What the text begins with.")],
    max_tokens: Annotated[int, typer.Option(help="At most this many new tokens.", min=1)] = 64,
    kv_cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Greedy text with a key-value cache."""
    if any("\ud800" <= char <= "\udfff" for char in prompt):
        raise MsQuantError(f"prompt: {prompt!r:.80} is not UTF-8 text")
    from ms_quant.data.tokenizer import load_tokenizer
    from ms_quant.evaluation.generation import Generator
    from ms_quant.formats.opening import open_model

    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode(prompt)
    model = open_model(checkpoint)
    _note_oddities(model)
    stops = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    generator = Generator(model, kv_cache, stops)
    new = list(generator.generate(ids, max_tokens))
    result = {"prompt": prompt, "text": tokenizer.decode(new), "tokens": new}
    emit(result, as_json, lambda result: print(prompt + result["text"]))


@app.command(epilog=example("ms-quant inspect Qwen3-8B-W8A8"))
def inspect(checkpoint: CheckpointArgument, as_json: JsonOption = False) -> None:
    """What a checkpoint holds: format, sizes, how each linear is stored."""
    from ms_quant.formats.inspection import inspect_checkpoint

    emit(inspect_checkpoint(checkpoint), as_json, _show_inspection)


@app.command(epilog=example("ms-quant schemes --json"))
def schemes(as_json: JsonOption = False) -> None:
    """The schemes and algorithms there are, and which runtime serves them."""
    from ms_quant.algorithms import ALGORITHMS, PLAIN
    from ms_quant.schemes.support import support_of
    from ms_quant.schemes.table import KV_CACHES, SCHEMES

    result = {
        "schemes": [
            {
                "name": scheme.name,
                "summary": scheme.summary,
                "formats": [_format_row(row) for row in support_of(scheme.name)],
                "options": list(scheme.options),
                "algorithms": [
                    PLAIN,
                    *(name for name, row in ALGORITHMS.items() if not row.suits(scheme)),
                ],
            }
            for scheme in SCHEMES.values()
        ],
        "algorithms": [
            {"name": name, "summary": algorithm.summary} for name, algorithm in ALGORITHMS.items()
        ],
        "kv_caches": [{"name": name, "summary": what} for name, what in KV_CACHES.items()],
    }
    emit(result, as_json, _show_schemes)


def _format_row(support: FormatSupport) -> dict[str, Any]:
    return {
        "format": support.format,
        "folds": [target.value for target in support.targets],
        "served_by": list(support.served_by),
        "only": dict(support.only),
        "not_served_by": list(support.not_served_by),
        "kernels": support.kernels,
    }


_NETWORKS = {
    "format": "",
    "served_by": [],
    "not_served_by": ["for networks: ms_quant.quantize(network, ...) and ms_quant.save_quantized"],
    "only": {},
    "kernels": "",
}


def _only(place: dict[str, Any]) -> list[str]:
    said = ", ".join(f"{option} {value}" for option, value in place["only"].items())
    return [f"only with {said}"] if said else []


def _show_verification(result: dict[str, Any]) -> None:
    for problem in result["problems"]:
        print(problem)
    if result["layers"]:
        worst = max(result["layers"], key=lambda layer: layer["output_error"])
        print(
            f"{len(result['layers'])} linears compared with the source, {result['made_again']} bit "
            f"for bit; largest relative output error {worst['output_error']:.4f} at "
            f"{worst['layer']}"
        )
        if result["unknown"]:
            print(f"{len(result['unknown'])} not compared: where their smoothing went is not known")
    for text in result["notes"]:
        note(f"note: {text}")
    for text in result["not_proved"]:
        print(f"not proved: {text}")
    if not result["problems"]:
        print(
            f"{result['checkpoint']}: {result['verdict']}, {result['quantized']} quantized linears"
        )


def _show_serving(result: dict[str, Any]) -> None:
    keys = ("checkpoint", "format", "runtime", "tp", "device")
    show_fields({key: result[key] or None for key in keys})
    if result["loaded"]:
        table = _table("layer", "ranks", "loaded as", "weight", "layers", "size")
        table.box, table.pad_edge, table.padding = SIMPLE_HEAD, False, (0, 1)
        for row in result["loaded"]:
            cells = [row[key] for key in ("kind", "ranks", "method", "weight", "layers")]
            table.add_row(*map(str, cells), human_bytes(row["bytes"]))
        Console().print(table)
    for problem in result["problems"]:
        print(problem)
    for text in result["notes"]:
        note(f"note: {text}")
    if result["line"]:
        print(result["line"])


def _show_inspection(result: dict[str, Any]) -> None:
    linears = result.pop("linears")
    show_fields(result)
    table = Table("linear", "stored as", "shape")
    for row in linears:
        table.add_row(row["name"], row["stored_as"], " x ".join(map(str, row["shape"])))
    Console().print(table)


def _table(*titles: str) -> Table:
    """One whose words are broken rather than cut off."""
    return Table(*(Column(title, overflow="fold") for title in titles))


def _show_schemes(result: dict[str, Any]) -> None:
    table = _table("scheme", "what", "algorithms")
    for row in result["schemes"]:
        table.add_row(row["name"], row["summary"], ", ".join(row["algorithms"]))
    Console().print(table)
    table = _table("scheme", "format", "served by", "kernels")
    for row in result["schemes"]:
        for place in row["formats"] or [_NETWORKS]:
            served = "\n".join([*place["served_by"], *place["not_served_by"], *_only(place)])
            table.add_row(row["name"], place["format"], served, place["kernels"])
    Console().print(table)
    for title, rows in (("algorithm", "algorithms"), ("KV cache", "kv_caches")):
        table = Table(title, "what")
        for row in result[rows]:
            table.add_row(row["name"], row["summary"])
        Console().print(table)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"ms-quant {__version__}")
        raise typer.Exit


def main() -> None:
    run(app)
