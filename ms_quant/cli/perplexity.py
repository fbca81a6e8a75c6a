"""``ms-quant eval --text``: perplexity of one checkpoint, or of two compared."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ms_quant.cli.console import block_progress, emit, exit_if_problems, note, show_fields
from ms_quant.cli.running import naming, note_length, opened, require_another, with_error

if TYPE_CHECKING:
    import numpy as np

    from ms_quant.evaluation.perplexity import Measurement
    from ms_quant.formats.opening import ServedModel


def run(
    checkpoint: Path,
    text: Path,
    seq_len: int,
    windows: int | None,
    kv_cache: str | None,
    float16: bool,
    drafts: bool,
    against: Path | None,
    as_json: bool,
) -> None:
    """Measures and prints. Arguments are the options of the command."""
    from ms_quant.data.calibration import eval_windows
    from ms_quant.formats.inspection import cache_name

    if against is not None and kv_cache is None and not float16:
        require_another(checkpoint, against)
    model = opened(checkpoint)
    other = None if against is None else opened(against)
    tokens = eval_windows(text, checkpoint, seq_len, windows, lambda said: note(f"note: {said}"))
    note_length(model, checkpoint, tokens.shape[1])
    if against is not None and other is not None:
        _require_comparable((model, other), (checkpoint, against), text, tokens, windows)
        note_length(other, against, tokens.shape[1])
    with tempfile.TemporaryDirectory(prefix="ms-quant-eval-") as root:
        keep = None if other is None else Path(root)
        found, problems = _measured(model, tokens, kv_cache, float16, keep)
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
        if other is not None and keep is not None:
            result |= {"against": str(against), "against_format": other.format}
            with naming(f"--against {against}"):
                result |= _differences(found, other, keep)
    emit(result, as_json, _show)
    exit_if_problems(problems)


def _measured(
    model: ServedModel,
    tokens: np.ndarray,
    kv_cache: str | None,
    float16: bool,
    keep: Path | None,
) -> tuple[dict[str, Measurement], list[str]]:
    """The losses of each way to compute a checkpoint, by what its keys in the result end with.

    Second, where its activations do not fit float16, if they do not.
    """
    from ms_quant.evaluation.perplexity import measure

    layers = model.config.num_layers
    with block_progress("evaluating", layers) as progress:
        found = {"": measure(model, tokens, progress, kv_cache=kv_cache, keep=keep)}
    if model.phased:
        with block_progress("evaluating decode", layers) as progress:
            found["_decode"] = measure(
                model, tokens, progress, decode=True, kv_cache=kv_cache, keep=keep
            )
    if float16:
        from ms_quant.evaluation.float16_forward import Float16OverflowError

        try:
            with block_progress("evaluating float16", layers) as progress:
                found["_float16"] = measure(model, tokens, progress, float16=True, keep=keep)
        except Float16OverflowError as error:
            return found, [str(error)]
    return found, []


def _drafts(model: ServedModel, tokens: np.ndarray, kv_cache: str | None) -> dict[str, Any]:
    from ms_quant.evaluation.drafts import drafts

    with block_progress("drafting", model.config.num_layers) as progress:
        found = drafts(model, tokens, progress, kv_cache=kv_cache)
    return {"draft_acceptance": found.acceptance, "draft_loss": found.loss}


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


def _differences(
    found: Mapping[str, Measurement], other: ServedModel, keep: Path
) -> dict[str, Any]:
    """How each way to compute a checkpoint compares with another checkpoint in float32.

    Args:
        found: the losses of each way, as ``_measured`` returns them.
        other: the other checkpoint.
        keep: directory for its last hidden states.
    """
    from ms_quant.evaluation.comparison import Comparison
    from ms_quant.evaluation.perplexity import measure

    tokens, layers = found[""].tokens, other.config.num_layers
    with block_progress("evaluating reference", layers) as progress:
        reference = {"": measure(other, tokens, progress, keep=keep)}
    if other.phased and "_decode" in found:
        with block_progress("evaluating reference decode", layers) as progress:
            reference["_decode"] = measure(other, tokens, progress, decode=True, keep=keep)
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
            shown[f"{key}{suffix}"] = with_error(shown[f"{key}{suffix}"], error, unit)
        shown[f"perplexity_increase{suffix}"] += f": {verdict}"
        if f"kl_divergence{suffix}" in result:
            error = shown.pop(f"kl_divergence_error{suffix}")
            divergence = with_error(shown[f"kl_divergence{suffix}"], error, "")
            shown[f"kl_divergence{suffix}"] = divergence.lstrip("+")
            agreed = shown.pop(f"top1_agreement{suffix}")
            shown[f"top-1_agreement{suffix}"] = f"{100 * agreed:.2f} %"
        if suffix and result[f"against_loss{suffix}"] == result["against_loss"]:
            del shown[f"against_perplexity{suffix}"], shown[f"against_loss{suffix}"]
    show_fields(shown)
