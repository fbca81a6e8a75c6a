"""Two checkpoints on the same tokens: their losses in pairs, and which differences are real.

Tokens of a window read each other, so a window counts once: the standard error is that of the mean
of one difference for each window. Both models find the same windows easy or hard; that part of the
spread is in neither, which is why the error of a difference is far below that of a perplexity.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.budget import BUDGET, Budget
from ms_quant.errors import BadArgumentError
from ms_quant.evaluation.arguments import AnyPath, opened
from ms_quant.evaluation.comparable import require_one_tokenizer, require_same_text
from ms_quant.evaluation.divergence import agreement
from ms_quant.evaluation.perplexity import (
    LastPredictions,
    Measurement,
    Perplexity,
    measure,
    text_windows,
)
from ms_quant.formats.opening import ServedModel
from ms_quant.formats.source_kind import model_directory
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.progress import StepProgress, of_blocks, silent

STANDARD_ERRORS = 2  # what is within them is not told apart from noise
FEW_WINDOWS = 10  # of fewer the standard error itself is off by a quarter and more
LARGEST = 500.0  # a loss difference whose exponential times any error is finite


def paired_difference(losses: np.ndarray, against: np.ndarray) -> tuple[float, float | None]:
    """The mean of ``losses - against`` and its standard error.

    Args:
        losses: of one model, (windows, tokens).
        against: of the other, for the same tokens.

    Returns:
        float64 numbers that the order of the windows does not change. The error of one window is
        None.
    """
    means = np.subtract(losses, against, dtype=np.float64).mean(axis=1)
    count = len(means)
    mean = math.fsum(means) / count
    if count == 1:
        return mean, None
    variance = math.fsum((means - mean) ** 2) / (count - 1)
    return mean, math.sqrt(variance / count)


@dataclass(frozen=True)
class Comparison:
    """How much worse a model predicts a text than another, and whether that is noise.

    Attributes:
        model: how well the model predicts.
        against: how well the other does.
        windows: how many windows both predicted.
        loss_difference: mean loss of the model, less that of the other.
        loss_difference_error: its standard error, from one difference for each window; None of one
            window, which has none.
        kl_divergence: of what the model predicts from what the other does, mean over the tokens,
            natural logarithm; None where the predictions were not kept.
        kl_divergence_error: its standard error, from one mean for each window; None of one window.
        top1_agreement: share of tokens for which both find the same one likeliest.
    """

    model: Perplexity
    against: Perplexity
    windows: int
    loss_difference: float
    loss_difference_error: float | None
    kl_divergence: float | None = None
    kl_divergence_error: float | None = None
    top1_agreement: float | None = None

    @classmethod
    def of(cls, model: Measurement, against: Measurement) -> Comparison:
        """Compares what was measured.

        Raises:
            MsQuantError: the two are not of the same windows.
        """
        _require_same_tokens(model.tokens, against.tokens)
        difference, error = paired_difference(model.losses, against.losses)
        found = cls(model.found, against.found, len(model.tokens), difference, error)
        if model.last is None or against.last is None:
            return found
        mean, spread, same = _agreement(model.last, against.last)
        return replace(found, kl_divergence=mean, kl_divergence_error=spread, top1_agreement=same)

    @property
    def perplexity_increase(self) -> float:
        """Perplexity over that of the other, less 1: 0.01 is 1 %."""
        return math.expm1(min(self.loss_difference, LARGEST))

    @property
    def perplexity_increase_error(self) -> float | None:
        """Its standard error, to first order; None of one window."""
        if self.loss_difference_error is None:
            return None
        return math.exp(min(self.loss_difference, LARGEST)) * self.loss_difference_error

    @property
    def told_apart(self) -> bool | None:
        """Whether the difference is larger than two standard errors; None of one window."""
        if self.loss_difference_error is None:
            return None
        return abs(self.loss_difference) > STANDARD_ERRORS * self.loss_difference_error

    @property
    def verdict(self) -> str:
        """What the difference is worth, in words."""
        if self.told_apart is None:
            return "one window has no standard error, expected at least 2"
        if self.loss_difference == self.loss_difference_error == 0:
            return f"no difference on {self.windows} windows"
        few = ", which are few: their standard error is rough" if self.windows < FEW_WINDOWS else ""
        if self.told_apart:
            return f"more than two standard errors on {self.windows} windows{few}"
        return f"not told apart from noise on {self.windows} windows{few}"

    def as_json(self) -> dict[str, Any]:
        """What the command prints of it."""
        return {
            "against_perplexity": self.against.perplexity,
            "against_loss": self.against.loss,
            "loss_difference": self.loss_difference,
            "loss_difference_error": self.loss_difference_error,
            "perplexity_increase": self.perplexity_increase,
            "perplexity_increase_error": self.perplexity_increase_error,
            "told_apart": self.told_apart,
            "verdict": self.verdict,
            **({} if self.kl_divergence is None else self._agreement_as_json()),
        }

    def _agreement_as_json(self) -> dict[str, Any]:
        names = "kl_divergence", "kl_divergence_error", "top1_agreement"
        return {name: getattr(self, name) for name in names}


def _agreement(
    model: LastPredictions, against: LastPredictions
) -> tuple[float, float | None, float]:
    """Mean divergence, its standard error, and the share of tokens with one likeliest choice."""
    windows, length, _ = model.states.shape
    states = (one.states.reshape(windows * length, -1) for one in (model, against))
    found = agreement(model.head(), next(states), against.head(), next(states))
    # Of each window's last token nothing is predicted here.
    divergences = found.divergences.reshape(windows, length)[:, :-1]
    mean, error = paired_difference(divergences, np.zeros_like(divergences))
    return mean, error, float(found.same.reshape(windows, length)[:, :-1].mean())


def compare(
    model: ServedModel | AnyPath,
    against: ServedModel | AnyPath | Measurement,
    data: np.ndarray | AnyPath,
    progress: StepProgress | None = None,
    *,
    seq_len: int = DEFAULTS.seq_len,
    windows: int | None = None,
    tokenizer: AnyPath | None = None,
    decode: bool = False,
    kv_cache: str | None = None,
    float16: bool = False,
    batch_tokens: int = BUDGET.batch_tokens,
) -> Comparison:
    """How much worse a checkpoint predicts a text than another, such as the float model.

    Both predict the same tokens, one after the other, each in bounded memory.

    Args:
        model: what :func:`ms_quant.open_model` opened, or the directory.
        against: the other, of the same vocabulary; or what ``measure`` found of it before.
        data: the text, as :func:`ms_quant.perplexity` takes it.
        progress: told how far each model is.
        seq_len: tokens of a window, of a file.
        windows: use only the first windows of a file; None is all.
        tokenizer: directory of the tokenizer files; None is that of the model. Where both models
            are directories with a tokenizer, the two must agree.
        decode: compute both as token by token, where linears tell the phases apart.
        kv_cache: how the model caches keys and values, as :func:`ms_quant.perplexity` takes it.
            The other is as its files say.
        float16: compute the model as a runtime that has float16 alone; the other is in float32.
        batch_tokens: of one forward of a block, but one window at least.

    Returns:
        Comparison.

    Raises:
        MsQuantError: a model or the file cannot be read, the vocabularies are not the same, or the
            activations of a model overflow.

    Examples:
        >>> import ms_quant
        >>> _ = ms_quant.quantize_checkpoint("Qwen3-8B", "out", "W8A8_DYNAMIC")
        >>> found = ms_quant.compare("out", "Qwen3-8B", "heldout.txt", seq_len=32, windows=12)
        >>> found.told_apart == (abs(found.loss_difference) > 2 * found.loss_difference_error)
        True
    """
    served = opened(model)
    other = against if isinstance(against, Measurement) else opened(against)
    tokens = text_windows(model, data, seq_len, windows, tokenizer)
    if isinstance(other, Measurement):
        _require_same_tokens(tokens, other.tokens)
    else:
        require_same_text(served, other, tokens.shape[1])
        place = model if tokenizer is None else tokenizer
        if isinstance(place, str | PathLike) and isinstance(against, str | PathLike):
            ours, theirs = model_directory(Path(place)), model_directory(Path(against))
            text = None if isinstance(data, np.ndarray) else Path(data)
            require_one_tokenizer(ours, theirs, text, tokens, windows)
    told, budget = progress or silent, Budget(batch_tokens=batch_tokens)
    with tempfile.TemporaryDirectory(prefix="ms-quant-compare-") as root:
        kept = not isinstance(other, Measurement) or other.last is not None
        keep = Path(root) if kept else None
        measured = measure(
            served,
            tokens,
            of_blocks(told, "evaluating", served.config.num_layers),
            decode=decode,
            kv_cache=kv_cache,
            float16=float16,
            budget=budget,
            keep=keep,
        )
        if not isinstance(other, Measurement):
            blocks = of_blocks(told, "evaluating reference", other.config.num_layers)
            other = measure(other, tokens, blocks, decode=decode, budget=budget, keep=keep)
        return Comparison.of(measured, other)


def _require_same_tokens(tokens: np.ndarray, against: np.ndarray) -> None:
    if not np.array_equal(tokens, against):
        raise BadArgumentError(
            f"against: was measured on {list(against.shape)} other tokens, expected the "
            f"{list(tokens.shape)} that the model is to predict"
        )
