"""How well a checkpoint predicts a text, block by block in bounded memory."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ms_quant.budget import BUDGET, Budget
from ms_quant.data.calibration import eval_windows
from ms_quant.errors import BadArgumentError
from ms_quant.evaluation.arguments import AnyPath, opened, tokenizer_directory
from ms_quant.evaluation.float16_forward import Float16Forward
from ms_quant.evaluation.float32_forward import Float32Forward
from ms_quant.evaluation.head import EMBEDDING, head_name, require_head
from ms_quant.files.atomic import free_space_check
from ms_quant.formats.opening import ServedModel
from ms_quant.job.states import HiddenStates, StoredStates
from ms_quant.models.embedding import Chunks, cross_entropy, used_rows
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.progress import BlockProgress, silent


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        perplexity: the exponential of the loss.
        loss: mean negative log likelihood of the predicted tokens, natural logarithm.
        tokens: how many were predicted.
        seconds: what it took.
    """

    perplexity: float
    loss: float
    tokens: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """What the command prints of it."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Measurement:
    """The loss of every token that a model predicted.

    Attributes:
        found: what :func:`perplexity` returns of them.
        tokens: the text, int32 (windows, seq_len).
        losses: negative log likelihoods, float32 (windows, seq_len - 1).
        last: where its predictions are kept, to be compared; None where nobody asked.
    """

    found: Perplexity
    tokens: np.ndarray
    losses: np.ndarray
    last: LastPredictions | None = None


@dataclass(frozen=True, eq=False)
class LastPredictions:
    """What a model predicts of each token, as its last hidden states and its head.

    Attributes:
        states: behind the last norm, float32 (windows, seq_len, hidden), a file.
        head: the head, in pieces, when it is asked for.
    """

    states: np.ndarray
    head: Callable[[], Chunks]


def perplexity(
    model: ServedModel | AnyPath,
    data: np.ndarray | AnyPath,
    progress: BlockProgress | None = None,
    *,
    seq_len: int = DEFAULTS.seq_len,
    windows: int | None = None,
    tokenizer: AnyPath | None = None,
    decode: bool = False,
    kv_cache: str | None = None,
    float16: bool = False,
    batch_tokens: int = BUDGET.batch_tokens,
) -> Perplexity:
    """Perplexity of a float or quantized checkpoint on a text.

    It is computed block by block in bounded memory, hidden states on disk. Every token of a window
    but its first is predicted from those before it in the window.

    Args:
        model: what :func:`ms_quant.open_model` opened, or the directory.
        data: the text: a file of text, JSON records, .parquet or .npz; or windows of token ids,
            int32 (windows, tokens), at least 2 tokens each.
        progress: told how far each block is.
        seq_len: tokens of a window, of a file.
        windows: use only the first windows of a file; None is all.
        tokenizer: directory of the tokenizer files; None is that of the model.
        decode: compute as token by token, where linears tell the phases apart.
        kv_cache: how keys and values are cached, ``"float"``, ``"C8"`` or ``"C8_DYNAMIC"``; all
            are read from the cache. None is as the checkpoint says.
        float16: compute as a runtime that has float16 alone; nothing else may be asked for.
        batch_tokens: of one forward of a block, but one window at least.

    Returns:
        Perplexity.

    Raises:
        MsQuantError: the model or the file cannot be read, a window is shorter than 2 tokens, or
            the model's activations overflow.

    Examples:
        >>> import ms_quant
        >>> found = ms_quant.perplexity("Qwen3-8B", "heldout.txt", seq_len=32, windows=4)
        >>> found.tokens
        124
        >>> found.perplexity > 1
        True
    """
    served = opened(model)
    require_head(served)
    tokens = text_windows(model, data, seq_len, windows, tokenizer)
    return measure(
        served,
        tokens,
        progress,
        decode=decode,
        kv_cache=kv_cache,
        float16=float16,
        budget=Budget(batch_tokens=batch_tokens),
    ).found


def text_windows(
    model: ServedModel | AnyPath,
    data: np.ndarray | AnyPath,
    seq_len: int,
    windows: int | None,
    tokenizer: AnyPath | None,
) -> np.ndarray:
    """Windows of token ids, int32 (windows, tokens), from the arguments of :func:`perplexity`.

    Raises:
        MsQuantError: the file cannot be read, or nothing says where the tokenizer is.
    """
    if isinstance(data, np.ndarray):
        return data
    return eval_windows(Path(data), tokenizer_directory(model, tokenizer), seq_len, windows)


def measure(
    model: ServedModel,
    tokens: np.ndarray,
    progress: BlockProgress | None = None,
    *,
    decode: bool = False,
    kv_cache: str | None = None,
    float16: bool = False,
    budget: Budget = BUDGET,
    keep: Path | None = None,
) -> Measurement:
    """The loss of every token, to be compared with another model's by ``Comparison.of``.

    Arguments and errors are those of :func:`perplexity`, but ``keep`` is a directory for the last
    hidden states, by which all that is predicted can be compared, not the losses alone.
    """
    require_head(model)
    if tokens.shape[1] < 2:
        raise BadArgumentError(f"seq_len is {tokens.shape[1]}, expected at least 2")
    started = time.monotonic()
    forward = _forward(model, tokens.shape[1], decode, kv_cache, float16, budget)
    with _place(keep) as directory:
        told = progress or silent
        losses, last = _losses(model, forward, tokens, Path(directory), told, budget)
    loss = float(losses.mean())
    if not math.isfinite(loss):
        raise BadArgumentError(
            f"the loss is {loss}: the activations of this model overflow float32"
        )
    found = Perplexity(
        perplexity=math.exp(min(loss, 700.0)),
        loss=loss,
        tokens=int(losses.size),
        seconds=round(time.monotonic() - started, 1),
    )
    head = partial(model.chunks, head_name(model))
    kept = None if keep is None else LastPredictions(last, head)
    return Measurement(found, tokens, losses.astype(np.float32), kept)


def _place(keep: Path | None) -> AbstractContextManager[str]:
    """A directory for hidden states, which stays where they are kept."""
    if keep is None:
        return tempfile.TemporaryDirectory(prefix="ms-quant-eval-")
    return nullcontext(tempfile.mkdtemp(dir=keep))


def token_losses(
    model: ServedModel,
    tokens: np.ndarray,
    progress: BlockProgress = silent,
    decode: bool = False,
    kv_cache: str | None = None,
    float16: bool = False,
    budget: Budget = BUDGET,
) -> np.ndarray:
    """Negative log likelihood of every predicted token, float64 (windows, seq_len - 1)."""
    forward = _forward(model, tokens.shape[1], decode, kv_cache, float16, budget)
    with _place(None) as directory:
        return _losses(model, forward, tokens, Path(directory), progress, budget)[0]


def _forward(
    model: ServedModel,
    length: int,
    decode: bool,
    kv_cache: str | None,
    float16: bool,
    budget: Budget,
) -> Forward:
    if float16:
        return Float16Forward(model, length, budget)
    return Float32Forward(model, length, decode, kv_cache, budget)


class Forward(Protocol):
    """How the blocks and the last norm of a checkpoint are computed."""

    def block(self, index: int) -> Callable[[np.ndarray], np.ndarray]:
        """The output of a block, float32 (B, S, hidden) of the same, all values finite."""

    def norm(self, x: np.ndarray) -> np.ndarray:
        """The last norm, float32 (B, S, hidden) of the same."""


def _losses(
    model: ServedModel,
    forward: Forward,
    tokens: np.ndarray,
    directory: Path,
    progress: BlockProgress,
    budget: Budget,
) -> tuple[np.ndarray, np.ndarray]:
    """The losses, float64 (windows, seq_len - 1), and the last hidden states."""
    count, length = tokens.shape
    last = last_states(model, forward, tokens, directory, progress, budget)
    # A copy without each window's last token would not fit in memory: its loss is dropped instead.
    rows, targets = last.reshape(-1, last.shape[2]), np.roll(tokens, -1, axis=1).ravel()
    losses = cross_entropy(model.chunks(head_name(model)), rows, targets, budget.logit_bytes)
    return losses.reshape(count, length)[:, :-1], last


def last_states(
    model: ServedModel,
    forward: Forward,
    tokens: np.ndarray,
    directory: Path,
    progress: BlockProgress,
    budget: Budget,
) -> np.ndarray:
    """What the last norm gives, float32 (windows, seq_len, hidden) in a file of a directory."""
    count, length = tokens.shape
    shape = (count, length, model.config.hidden_size)
    free_space_check(directory, 2 * 4 * math.prod(shape))
    source = directory / "hidden-0.npy"
    _write(source, shape, map(used_rows(model.chunks(EMBEDDING), tokens), tokens))
    batch = budget.windows(length)

    def outputs(source: Path, index: int) -> Iterator[np.ndarray]:
        block, states = forward.block(index), StoredStates(source, shape)
        for start in range(0, count, batch):
            yield from block(states[start : start + batch])
            progress(index, min(1.0, (start + batch) / count))

    for index in range(model.config.num_layers):
        target = directory / f"hidden-{index + 1}.npy"
        _write(target, shape, outputs(source, index))
        source.unlink()
        source = target
    last = np.load(source, mmap_mode="r+")
    for start in range(0, count, batch):
        last[start : start + batch] = forward.norm(last[start : start + batch])
    return last


def _write(path: Path, shape: tuple[int, int, int], rows: Iterable[np.ndarray]) -> None:
    hidden = HiddenStates(path, shape)
    for row in rows:
        hidden.append(row)
    hidden.commit()
