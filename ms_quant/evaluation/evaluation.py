"""What quantization cost: perplexity of a checkpoint, and the text it writes."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from mindspore import Tensor

from ms_quant.budget import BATCH_TOKENS
from ms_quant.cells.decoder import (
    DecoderBlock,
    RMSNorm,
    causal_mask,
    rope_tensors,
)
from ms_quant.cells.kv_cache import Int8KeyValueCache
from ms_quant.cells.quant_linear import QuantLinear
from ms_quant.cells.tree import replace_cell
from ms_quant.errors import MsQuantError
from ms_quant.evaluation.float16_forward import Float16Forward
from ms_quant.files.atomic import free_space_check
from ms_quant.formats.opening import ServedModel
from ms_quant.job.directory import HiddenStates, read_hidden
from ms_quant.models.cache import KeyValueCache
from ms_quant.models.embedding import Table, cross_entropy, used_rows
from ms_quant.models.names import block_name, block_prefix
from ms_quant.numerics.affine import check_finite
from ms_quant.schemes.table import DYNAMIC_CACHE, FLOAT_CACHE, KV_CACHES, STATIC_CACHE

EMBEDDING = "model.embed_tokens.weight"
Progress = Callable[[int, float], None]
"""Called with a block's index and how much of it is done, 0 to 1."""


def silent(index: int, part: float) -> None:
    """No progress is shown."""


def load_block(model: ServedModel, index: int) -> DecoderBlock:
    """One decoder block with its int8 linears in place."""
    block = DecoderBlock(model.config)
    block.set_train(False)
    prefix = block_prefix(index)
    swapped = set()
    for path in model.config.block(index).linears:
        linear = model.linear(prefix + path)
        if linear is not None:
            replace_cell(block, path, QuantLinear(linear))
            swapped.add(path)
    for name in model.config.block(index).tensors:
        if name.rpartition(".")[0] not in swapped:
            parameter = dict(block.parameters_and_names())[name]
            parameter.set_data(Tensor.from_numpy(model.tensor(prefix + name)))
    return block


def is_phased(model: ServedModel) -> bool:
    """Whether linears of a model tell prefill and decode apart."""
    return model.phased


def new_caches(model: ServedModel, kind: str | None = None) -> list[Callable[[], KeyValueCache]]:
    """What makes an empty cache, for each block.

    Args:
        model: the checkpoint.
        kind: ``"float"`` or one of ``KV_CACHES``; None is the checkpoint's own.

    Raises:
        MsQuantError: there is no such kind, or the checkpoint has no scales for it.
    """
    if kind not in (None, FLOAT_CACHE, *KV_CACHES):
        known = ", ".join([FLOAT_CACHE, *KV_CACHES])
        raise MsQuantError(f"kv cache {kind!r} is unknown, expected one of {known}")
    if kind == DYNAMIC_CACHE:
        return [Int8KeyValueCache] * model.config.num_layers
    scales = [model.cache_scales(index) for index in range(model.config.num_layers)]
    if kind == STATIC_CACHE and None in scales:
        raise MsQuantError(
            f"kv cache {kind}: the checkpoint has no scales for it, expected another"
        )
    if kind == FLOAT_CACHE:
        return [KeyValueCache] * model.config.num_layers
    return [KeyValueCache if s is None else partial(Int8KeyValueCache, s) for s in scales]


def load_norm(model: ServedModel) -> RMSNorm:
    """The last norm."""
    norm = RMSNorm(model.config.hidden_size, model.config.rms_norm_eps)
    norm.weight.set_data(Tensor.from_numpy(model.tensor("model.norm.weight")))
    return norm


def require_head(model: ServedModel) -> None:
    """Refuses a model that predicts no tokens.

    Raises:
        MsQuantError: it gives out labels or its last hidden states.
    """
    if not model.config.predicts:
        what = "a classifier" if model.config.labels else "its last hidden states (no lm_head)"
        raise MsQuantError(
            f"the model gives out {what}, expected one that predicts tokens: there is no "
            "perplexity and no text of it"
        )


def head_name(model: ServedModel) -> str:
    return EMBEDDING if model.config.tied else "lm_head.weight"


def perplexity(
    model: ServedModel,
    tokens: np.ndarray,
    progress: Progress = silent,
    decode: bool = False,
    kv_cache: str | None = None,
    float16: bool = False,
) -> dict[str, Any]:
    """Perplexity over windows of tokens, block by block, hidden states on disk.

    Every token of a window but its first is predicted from those before it in the window.

    Args:
        model: the checkpoint.
        tokens: int32 (windows, seq_len), seq_len at least 2.
        progress: told how far each block is.
        decode: compute as token by token, where linears tell the phases apart.
        kv_cache: how keys and values are cached, see :func:`new_caches`; all are read from the
            cache.
        float16: compute as a runtime that has float16 alone, see
            :mod:`ms_quant.evaluation.float16_forward`; nothing else may be asked for.

    Returns:
        ``perplexity``, ``loss`` (mean negative log likelihood, natural logarithm), ``tokens``
        (predicted ones) and ``seconds``.

    Raises:
        MsQuantError: a window is shorter than 2 tokens, or the model's activations overflow.
    """
    require_head(model)
    if tokens.shape[1] < 2:
        raise MsQuantError(f"seq_len is {tokens.shape[1]}, expected at least 2")
    started = time.monotonic()
    losses = token_losses(model, tokens, progress, decode, kv_cache, float16)
    loss = float(losses.mean())
    if not math.isfinite(loss):
        raise MsQuantError(f"the loss is {loss}: the activations of this model overflow float32")
    return {
        "perplexity": math.exp(min(loss, 700.0)),
        "loss": loss,
        "tokens": int(losses.size),
        "seconds": round(time.monotonic() - started, 1),
    }


def token_losses(
    model: ServedModel,
    tokens: np.ndarray,
    progress: Progress = silent,
    decode: bool = False,
    kv_cache: str | None = None,
    float16: bool = False,
) -> np.ndarray:
    """Negative log likelihood of every predicted token, float64 (windows, seq_len - 1)."""
    forward: Forward
    if float16:
        forward = Float16Forward(model, tokens.shape[1])
    else:
        forward = CellForward(model, tokens.shape[1], decode, kv_cache)
    with tempfile.TemporaryDirectory(prefix="ms-quant-eval-") as directory:
        return _losses(model, forward, tokens, Path(directory), progress)


class Forward(Protocol):
    """How the blocks and the last norm of a checkpoint are computed."""

    def block(self, index: int) -> Callable[[np.ndarray], np.ndarray]:
        """The output of a block, float32 (B, S, hidden) of the same, all values finite."""

    def norm(self, x: np.ndarray) -> np.ndarray:
        """The last norm, float32 (B, S, hidden) of the same."""


class CellForward:
    """The Cells, in float32. Arguments are those of :func:`perplexity`."""

    def __init__(self, model: ServedModel, length: int, decode: bool, kv_cache: str | None):
        self.model, self.decode = model, decode
        self.caches = new_caches(model, kv_cache)
        self.length, self.mask = length, causal_mask(length)
        self.last = load_norm(model)

    def block(self, index: int) -> Callable[[np.ndarray], np.ndarray]:
        block, config = load_block(self.model, index), self.model.config
        angles = rope_tensors(config, 0, self.length, config.rotates(index))

        def output(hidden: np.ndarray) -> np.ndarray:
            cache = self.caches[index]()
            made = block(Tensor(hidden), *angles, self.mask, cache, self.decode)
            return finite(made, index)

        return output

    def norm(self, x: np.ndarray) -> np.ndarray:
        return self.last(Tensor(x)).asnumpy()


def _losses(
    model: ServedModel,
    forward: Forward,
    tokens: np.ndarray,
    directory: Path,
    progress: Progress,
) -> np.ndarray:
    count, length = tokens.shape
    shape = (count, length, model.config.hidden_size)
    free_space_check(directory, 2 * 4 * math.prod(shape))
    source = directory / "hidden-0.npy"
    _write(source, shape, map(used_rows(model.chunks(EMBEDDING), tokens), tokens))
    batch = max(1, BATCH_TOKENS // length)

    def outputs(source: Path, index: int) -> Iterator[np.ndarray]:
        block = forward.block(index)
        for start in range(0, count, batch):
            yield from block(read_hidden(source, start, start + batch))
            progress(index, min(1.0, (start + batch) / count))

    for index in range(model.config.num_layers):
        target = directory / f"hidden-{index + 1}.npy"
        _write(target, shape, outputs(source, index))
        source.unlink()
        source = target
    last = np.load(source, mmap_mode="r+")
    for start in range(0, count, batch):
        last[start : start + batch] = forward.norm(last[start : start + batch])
    # A copy without each window's last token would not fit in memory: its loss is dropped instead.
    rows, targets = last.reshape(-1, shape[2]), np.roll(tokens, -1, axis=1).ravel()
    losses = cross_entropy(model.chunks(head_name(model)), rows, targets)
    return losses.reshape(count, length)[:, :-1]


def finite(hidden: Tensor, index: int) -> np.ndarray:
    """The output of a block.

    Raises:
        MsQuantError: a value is NaN or infinite; names the block.
    """
    values = hidden.asnumpy()
    check_finite(values, f"{block_name(index)}: output")
    return values


def _write(path: Path, shape: tuple[int, int, int], rows: Iterable[np.ndarray]) -> None:
    hidden = HiddenStates(path, shape)
    for row in rows:
        hidden.append(row)
    hidden.commit()


class Generator:
    """A whole model in memory, for greedy generation with a key-value cache.

    Args:
        model: the checkpoint.
        kv_cache: how keys and values are cached, see :func:`new_caches`.
        stops: tokens that end a generation beside those of the config, such as the tokenizer's.

    Raises:
        MsQuantError: the model has no head.
    """

    def __init__(
        self, model: ServedModel, kv_cache: str | None = None, stops: Collection[int] = ()
    ):
        require_head(model)
        self.stops = {*model.config.eos_token_ids, *stops}
        self.config = model.config
        self.table = Table(model.tensor(EMBEDDING))
        self.blocks = [load_block(model, index) for index in range(model.config.num_layers)]
        self.new_caches = new_caches(model, kv_cache)
        self.norm = load_norm(model)
        tied = model.config.tied
        self.head = self.table if tied else Table(model.tensor(head_name(model)))

    def generate(self, prompt: np.ndarray, new_tokens: int) -> Iterator[int]:
        """Yields the most likely next token again and again, until an end token or the limit.

        Args:
            prompt: int32 (S,), at least one token.
            new_tokens: at most this many.
        """
        if not len(prompt):
            raise MsQuantError("the prompt has no tokens, expected at least one")
        caches = [new_cache() for new_cache in self.new_caches]
        ids = np.asarray(prompt, np.int64)
        for _ in range(new_tokens):
            token = int(np.argmax(self._step(ids, caches)))
            if token in self.stops:
                return
            yield token
            ids = np.array([token])

    def _step(self, ids: np.ndarray, caches: list[KeyValueCache]) -> np.ndarray:
        """Logits of the token after ``ids``."""
        start, stop = caches[0].length, caches[0].length + len(ids)
        turned = rope_tensors(self.config, start, stop)
        still = rope_tensors(self.config, start, stop, False) if self.config.unrotated else turned
        mask = causal_mask(stop)[:, :, start:]
        hidden = Tensor(self.table.rows(ids)[None])
        for index, (block, cache) in enumerate(zip(self.blocks, caches, strict=True)):
            angles = turned if self.config.rotates(index) else still
            hidden = block(hidden, *angles, mask, cache, start > 0)
            finite(hidden, index)
        last = self.norm(hidden[:, -1:]).asnumpy().reshape(-1)
        return self.head.matmul(last)
