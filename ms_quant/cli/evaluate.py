"""The commands that run a model: perplexity and text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ms_quant.cli.arguments import CacheOption, CheckpointArgument
from ms_quant.cli.console import (
    JsonOption,
    block_progress,
    emit,
    exit_if_problems,
    given_model,
    note,
    show_fields,
)
from ms_quant.errors import BadArgumentError, MsQuantError
from ms_quant.pipeline.defaults import DEFAULTS

if TYPE_CHECKING:
    import numpy as np

    from ms_quant.evaluation.perplexity import Measurement
    from ms_quant.formats.opening import ServedModel


def evaluate(
    checkpoint: CheckpointArgument,
    text: Annotated[Path, typer.Option(help="Text, JSON records, .parquet or .npz to predict.")],
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = DEFAULTS.seq_len,
    windows: Annotated[int | None, typer.Option(help="Use only the first windows.", min=1)] = None,
    kv_cache: CacheOption = None,
    float16: Annotated[
        bool, typer.Option("--float16", help="Also as a runtime computes that has float16 alone.")
    ] = False,
    drafts: Annotated[
        bool,
        typer.Option(
            "--drafts",
            help="Also which share of the drafts of a multi-token prediction layer is what the "
            "model itself predicts.",
        ),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Another checkpoint of the vocabulary, such as the float model: also how much "
            "the perplexity differs from its own, and the standard error of that. It is computed "
            "in float32, with the cache that its files say.",
            callback=given_model,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a float or quantized checkpoint."""
    from ms_quant.data.calibration import eval_windows
    from ms_quant.formats.inspection import cache_name

    if against is not None and kv_cache is None and not float16:
        _require_another(checkpoint, against)
    model = opened(checkpoint)
    other = None if against is None else opened(against)
    tokens = eval_windows(text, checkpoint, seq_len, windows, lambda said: note(f"note: {said}"))
    _note_length(model, checkpoint, tokens.shape[1])
    if against is not None and other is not None:
        _require_comparable((model, other), (checkpoint, against), text, tokens, windows)
        _note_length(other, against, tokens.shape[1])
    found, problems = _measured(model, tokens, kv_cache, float16)
    result = {
        "checkpoint": str(checkpoint),
        "format": model.format,
        "kv_cache": kv_cache or cache_name(model),
        **found[""].found.as_json(),
    }
    if drafts:
        result |= _drafts(model, tokens, kv_cache)
    for suffix in [suffix for suffix in found if suffix]:
        result[f"perplexity{suffix}"] = found[suffix].found.perplexity
        result[f"loss{suffix}"] = found[suffix].found.loss
    if problems:
        result["float16_overflow"] = problems[0]
    if other is not None:
        result |= {"against": str(against), "against_format": other.format}
        with _naming(f"--against {against}"):
            result |= _differences(found, other)
    emit(result, as_json, _show)
    exit_if_problems(problems)


def _measured(
    model: ServedModel, tokens: np.ndarray, kv_cache: str | None, float16: bool
) -> tuple[dict[str, Measurement], list[str]]:
    """The losses of each way to compute a checkpoint, by what its keys in the result end with.

    Second, where its activations do not fit float16, if they do not.
    """
    from ms_quant.evaluation.perplexity import measure

    layers = model.config.num_layers
    with block_progress("evaluating", layers) as progress:
        found = {"": measure(model, tokens, progress, kv_cache=kv_cache)}
    if model.phased:
        with block_progress("evaluating decode", layers) as progress:
            found["_decode"] = measure(model, tokens, progress, decode=True, kv_cache=kv_cache)
    if float16:
        from ms_quant.evaluation.float16_forward import Float16OverflowError

        try:
            with block_progress("evaluating float16", layers) as progress:
                found["_float16"] = measure(model, tokens, progress, float16=True)
        except Float16OverflowError as error:
            return found, [str(error)]
    return found, []


def _drafts(model: ServedModel, tokens: np.ndarray, kv_cache: str | None) -> dict[str, Any]:
    from ms_quant.evaluation.drafts import drafts

    with block_progress("drafting", model.config.num_layers) as progress:
        found = drafts(model, tokens, progress, kv_cache=kv_cache)
    return {"draft_acceptance": found.acceptance, "draft_loss": found.loss}


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Says of which of two checkpoints an error is."""
    try:
        yield
    except MsQuantError as error:
        raise type(error)(f"{place}: {error}") from None


def opened(checkpoint: Path) -> ServedModel:
    from ms_quant.formats.opening import open_model

    model = open_model(checkpoint)
    _note_oddities(model)
    return model


def _require_another(checkpoint: Path, against: Path) -> None:
    if against.resolve() == checkpoint.resolve():
        raise BadArgumentError(
            f"--against: {against} is the checkpoint itself, expected another, or --kv-cache or "
            "--float16 to see what they change"
        )


def _require_comparable(
    models: tuple[ServedModel, ServedModel],
    places: tuple[Path, Path],
    text: Path,
    tokens: np.ndarray,
    windows: int | None,
) -> None:
    """Refuses what makes a comparison of the second with the first senseless."""
    from ms_quant.evaluation.comparable import require_one_tokenizer, require_same_text

    names = (str(places[0]), f"--against {places[1]}")
    require_same_text(*models, tokens.shape[1], names)
    unknown = require_one_tokenizer(*places, text, tokens, windows)
    if unknown:
        note(f"note: {unknown}, so only the sizes of their vocabularies were compared")


def _differences(found: Mapping[str, Measurement], other: ServedModel) -> dict[str, Any]:
    """How each way to compute a checkpoint compares with another checkpoint in float32.

    Args:
        found: the losses of each way, as ``_measured`` returns them.
        other: the other checkpoint.
    """
    from ms_quant.evaluation.comparison import Comparison
    from ms_quant.evaluation.perplexity import measure

    tokens, layers = found[""].tokens, other.config.num_layers
    with block_progress("evaluating reference", layers) as progress:
        reference = {"": measure(other, tokens, progress)}
    if other.phased and "_decode" in found:
        with block_progress("evaluating reference decode", layers) as progress:
            reference["_decode"] = measure(other, tokens, progress, decode=True)
    result: dict[str, Any] = {"windows": len(tokens)}
    for suffix, measured in found.items():
        compared = Comparison.of(measured, reference.get(suffix, reference[""]))
        result |= {f"{key}{suffix}": value for key, value in compared.as_json().items()}
    return result


def _show(result: dict[str, Any]) -> None:
    """The result as two columns, a difference with its error and what it is worth on one line."""
    shown = dict(result)
    for suffix in ("", "_decode", "_float16"):
        if f"verdict{suffix}" not in result:
            continue
        verdict = shown.pop(f"verdict{suffix}")
        del shown[f"told_apart{suffix}"]
        for key, unit in (("loss_difference", ""), ("perplexity_increase", "%")):
            error = shown.pop(f"{key}_error{suffix}")
            shown[f"{key}{suffix}"] = _with_error(shown[f"{key}{suffix}"], error, unit)
        shown[f"perplexity_increase{suffix}"] += f": {verdict}"
        if suffix and result[f"against_loss{suffix}"] == result["against_loss"]:
            del shown[f"against_perplexity{suffix}"], shown[f"against_loss{suffix}"]
    show_fields(shown)


def _with_error(value: float, error: float | None, unit: str) -> str:
    """0.00183, 0.0011 -> "+0.18 % ± 0.11 %": two digits of the error, and two places at least."""
    scale, unit = (100, f" {unit}") if unit else (1, "")
    size = abs(error or value)
    digits = max(2, 1 - math.floor(math.log10(scale * size))) if size else 2
    found = f"{scale * value:+.{digits}f}{unit}"
    return found if error is None else f"{found} ± {scale * error:.{digits}f}{unit}"


def _note_length(model: ServedModel, place: Path, positions: int) -> None:
    """Says so where a text is longer than those that a model was made for."""
    if beyond := model.config.beyond(positions):
        note(f"note: {place}: {beyond}, the text has {positions}")


def _note_oddities(model: Any) -> None:
    """What is wrong or odd in the files of a checkpoint that can be read all the same."""
    structure = getattr(model, "structure", None)
    for text in [*structure.defects, *structure.notes] if structure else []:
        note(f"note: {text}")


def generate(
    checkpoint: CheckpointArgument,
    prompt: Annotated[str, typer.Option(help="What the text begins with.")],
    max_tokens: Annotated[
        int, typer.Option(help="At most this many new tokens.", min=1)
    ] = DEFAULTS.max_tokens,
    kv_cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Greedy text with a key-value cache."""
    from ms_quant.evaluation.generation import generate as text_of

    model = opened(checkpoint)
    found = text_of(model, prompt, max_tokens=max_tokens, kv_cache=kv_cache, tokenizer=checkpoint)
    _note_length(model, checkpoint, found.positions)
    emit(found.as_json(), as_json, lambda result: print(prompt + result["text"]))
