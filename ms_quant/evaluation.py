"""What quantization cost: perplexity of a checkpoint, and the text it writes."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from ms_quant.cells.quant_linear import QuantLinear
from ms_quant.cells.tree import replace_cell
from ms_quant.checkpoint.job import HiddenStates, read_hidden
from ms_quant.checkpoint.serving import ServedModel
from ms_quant.errors import MsQuantError
from ms_quant.models.cache import KeyValueCache
from ms_quant.models.config import block_prefix
from ms_quant.models.decoder import (
    DecoderBlock,
    RMSNorm,
    causal_mask,
    rope_tensors,
)

BATCH_TOKENS = 2048
LOGIT_BYTES = 64 << 20


def load_block(model: ServedModel, index: int) -> DecoderBlock:
    """One decoder block with its int8 linears in place."""
    block = DecoderBlock(model.config)
    block.set_train(False)
    prefix = block_prefix(index)
    swapped = set()
    for path in model.config.linear_shapes():
        linear = model.linear(prefix + path)
        if linear is not None:
            replace_cell(block, path, QuantLinear(linear))
            swapped.add(path)
    for name in model.config.block_shapes():
        if name.rpartition(".")[0] not in swapped:
            parameter = dict(block.parameters_and_names())[name]
            parameter.set_data(Tensor.from_numpy(model.tensor(prefix + name)))
    return block


def load_norm(model: ServedModel) -> RMSNorm:
    """The last norm."""
    norm = RMSNorm(model.config.hidden_size, model.config.rms_norm_eps)
    norm.weight.set_data(Tensor.from_numpy(model.tensor("model.norm.weight")))
    return norm


def head_weight(model: ServedModel) -> np.ndarray:
    """float32 (vocab, hidden)."""
    tied = model.config.tied
    return model.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")


def perplexity(
    model: ServedModel,
    tokens: np.ndarray,
    progress: Callable[[int, float], None] = lambda index, part: None,
) -> dict[str, Any]:
    """Perplexity over windows of tokens, block by block, hidden states on disk.

    Every token of a window but its first is predicted from those before it in the window.

    Args:
        model: the checkpoint.
        tokens: int32 (windows, seq_len), seq_len at least 2.
        progress: told how far each block is.

    Returns:
        ``perplexity``, ``loss`` (mean negative log likelihood, natural logarithm), ``tokens``
        (predicted ones) and ``seconds``.

    Raises:
        MsQuantError: a window is shorter than 2 tokens, or the model's activations overflow.
    """
    if tokens.shape[1] < 2:
        raise MsQuantError(f"seq_len is {tokens.shape[1]}, expected at least 2")
    started = time.monotonic()
    losses = token_losses(model, tokens, progress)
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
    progress: Callable[[int, float], None] = lambda index, part: None,
) -> np.ndarray:
    """Negative log likelihood of every predicted token, float64 (windows, seq_len - 1)."""
    with tempfile.TemporaryDirectory(prefix="ms-quant-eval-") as directory:
        return _losses(model, tokens, Path(directory), progress)


def _losses(
    model: ServedModel,
    tokens: np.ndarray,
    directory: Path,
    progress: Callable[[int, float], None],
) -> np.ndarray:
    count, length = tokens.shape
    shape = (count, length, model.config.hidden_size)
    table = model.tensor("model.embed_tokens.weight")
    source = directory / "hidden-0.npy"
    _write_hidden(source, shape, (table[row] for row in tokens))
    del table
    cos, sin = rope_tensors(model.config, 0, length)
    mask = causal_mask(length)
    batch = max(1, BATCH_TOKENS // length)
    for index in range(model.config.num_layers):
        block = load_block(model, index)

        def outputs(source: Path = source, block: nn.Cell = block, index: int = index):
            for start in range(0, count, batch):
                hidden = Tensor(read_hidden(source, start, start + batch))
                yield from block(hidden, cos, sin, mask).asnumpy()
                progress(index, min(1.0, (start + batch) / count))

        target = directory / f"hidden-{index + 1}.npy"
        _write_hidden(target, shape, outputs())
        source.unlink()
        source = target
    norm, head = load_norm(model), nn.Dense(shape[2], model.config.vocab_size, has_bias=False)
    head.weight.set_data(Tensor.from_numpy(head_weight(model)))
    losses = []
    for start in range(0, count, batch):
        hidden = norm(Tensor(read_hidden(source, start, start + batch)[:, :-1])).asnumpy()
        rows = hidden.reshape(-1, shape[2])
        losses.append(_cross_entropy(head, rows, tokens[start : start + batch, 1:].reshape(-1)))
    return np.concatenate(losses).reshape(count, length - 1)


def _write_hidden(path: Path, shape: tuple[int, int, int], rows: Iterator[np.ndarray]) -> None:
    hidden = HiddenStates(path, shape)
    for row in rows:
        hidden.append(row)
    hidden.commit()


def _cross_entropy(head: nn.Cell, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log likelihood of each target, float64, with bounded logits in memory."""
    step = max(1, LOGIT_BYTES // (4 * head.out_channels))
    losses = []
    for start in range(0, len(rows), step):
        logits = head(Tensor(rows[start : start + step])).asnumpy()
        chosen = logits[np.arange(len(logits)), targets[start : start + step]].astype(np.float64)
        top = logits.max(axis=1, keepdims=True)
        total = np.exp(logits - top).sum(axis=1, dtype=np.float64)
        losses.append(np.log(total) + top[:, 0] - chosen)
    return np.concatenate(losses)


class Generator:
    """A whole model in memory, for greedy generation with a key-value cache.

    Args:
        model: the checkpoint.
    """

    def __init__(self, model: ServedModel):
        self.config = model.config
        self.table = model.tensor("model.embed_tokens.weight")
        self.blocks = [load_block(model, index) for index in range(model.config.num_layers)]
        self.norm = load_norm(model)
        self.head = self.table if model.config.tied else head_weight(model)

    def generate(self, prompt: np.ndarray, new_tokens: int) -> Iterator[int]:
        """Yields the most likely next token again and again, until an end token or the limit.

        Args:
            prompt: int32 (S,), at least one token.
            new_tokens: at most this many.
        """
        if not len(prompt):
            raise MsQuantError("the prompt has no tokens, expected at least one")
        caches = [KeyValueCache() for _ in self.blocks]
        ids = np.asarray(prompt, np.int64)
        for _ in range(new_tokens):
            token = int(np.argmax(self._step(ids, caches)))
            if token in self.config.eos_token_ids:
                return
            yield token
            ids = np.array([token])

    def _step(self, ids: np.ndarray, caches: list[KeyValueCache]) -> np.ndarray:
        """Logits of the token after ``ids``."""
        start, stop = caches[0].length, caches[0].length + len(ids)
        cos, sin = rope_tensors(self.config, start, stop)
        mask = causal_mask(stop)[:, :, start:]
        hidden = Tensor(self.table[ids][None])
        for block, cache in zip(self.blocks, caches, strict=True):
            hidden = block(hidden, cos, sin, mask, cache)
        last = self.norm(hidden[:, -1:]).asnumpy().reshape(-1)
        return self.head @ last
