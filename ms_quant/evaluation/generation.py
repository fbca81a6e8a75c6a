"""Greedy text of a checkpoint, with a key-value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ms_quant.data.tokenizer import load_tokenizer
from ms_quant.errors import BadArgumentError
from ms_quant.evaluation.arguments import AnyPath, opened, tokenizer_directory
from ms_quant.evaluation.decoder import Decoder
from ms_quant.formats.opening import ServedModel
from ms_quant.pipeline.defaults import DEFAULTS


@dataclass(frozen=True)
class Generation:
    """A text that a model went on with.

    Attributes:
        prompt: what it began with.
        text: what came after that.
        tokens: the ids of ``text``.
        positions: how many there are, with those of the prompt.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    positions: int

    def as_json(self) -> dict[str, Any]:
        """What the command prints of it."""
        return {"prompt": self.prompt, "text": self.text, "tokens": list(self.tokens)}


def generate(
    model: ServedModel | AnyPath,
    prompt: str,
    *,
    max_tokens: int = DEFAULTS.max_tokens,
    kv_cache: str | None = None,
    tokenizer: AnyPath | None = None,
) -> Generation:
    """Greedy text of a float or quantized checkpoint, with a key-value cache.

    Args:
        model: what :func:`ms_quant.open_model` opened, or the directory.
        prompt: what the text begins with.
        max_tokens: at most this many new tokens.
        kv_cache: how keys and values are cached, ``"float"``, ``"C8"`` or ``"C8_DYNAMIC"``. None
            is as the checkpoint says.
        tokenizer: directory of the tokenizer files; None is that of the model.

    Returns:
        Generation. It ends with an end token, which is not part of it, or at ``max_tokens``.

    Raises:
        MsQuantError: the checkpoint cannot be read, or the prompt is not UTF-8 text or has no
            tokens.

    Examples:
        >>> import ms_quant
        >>> found = ms_quant.generate("Qwen3-8B", "The capital of France", max_tokens=3)
        >>> len(found.tokens) <= 3
        True
    """
    if any("\ud800" <= char <= "\udfff" for char in prompt):
        raise BadArgumentError(f"prompt: {prompt!r:.80} is not UTF-8 text")
    words = load_tokenizer(tokenizer_directory(model, tokenizer))
    ids = words.encode_prompt(prompt)
    stops = [] if words.eos_id is None else [words.eos_id]
    generator = Generator(opened(model), kv_cache, stops)
    new = list(generator.generate(ids, max_tokens))
    return Generation(prompt, words.decode(new), tuple(new), len(ids) + len(new))


class Generator:
    """Greedy generation by a model that is in memory.

    Args:
        model: the checkpoint.
        kv_cache: how keys and values are cached, see :func:`ms_quant.evaluation.caches.new_caches`.
        stops: tokens that end a generation beside those of the config, such as the tokenizer's.

    Raises:
        MsQuantError: the model has no head.
    """

    def __init__(
        self, model: ServedModel, kv_cache: str | None = None, stops: Collection[int] = ()
    ):
        self.decoder = Decoder(model, kv_cache)
        self.stops = {*model.config.eos_token_ids, *stops}

    def generate(self, prompt: np.ndarray, new_tokens: int) -> Iterator[int]:
        """Yields the most likely next token again and again, until an end token or the limit.

        Args:
            prompt: int32 (S,), at least one token.
            new_tokens: at most this many.
        """
        sequence = self.decoder.begin()
        logits = self.decoder.prefill(sequence, np.asarray(prompt, np.int64))
        for left in range(new_tokens, 0, -1):
            token = int(np.argmax(logits))
            if token in self.stops:
                return
            yield token
            if left > 1:
                logits = self.decoder.step([token], [sequence])[0]
