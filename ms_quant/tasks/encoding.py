"""From prompts to token ids, by the rules of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ms_quant.data.tokenizer import ModelTokenizer
from ms_quant.errors import BadArgumentError


@dataclass(frozen=True, eq=False)
class Request:
    """A context, and what may go on.

    Attributes:
        context: int32 ids, one at least.
        continuations: int32 ids of each; of none only the token after the context is looked at.
    """

    context: np.ndarray
    continuations: tuple[np.ndarray, ...]


class PromptEncoder:
    """Ids of contexts and of what goes on.

    Args:
        words: the tokenizer of the model.
    """

    def __init__(self, words: ModelTokenizer):
        self._words, self._first = words, words.first_ids
        self._bos = words.special.get("bos_token", "")

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text; the begin-of-sequence token is not put before one that has it."""
        ids = self._words.encode(text)
        if self._bos and text.startswith(self._bos):
            return ids
        return np.concatenate([self._first, ids])

    def request(self, context: str, continuations: Sequence[str]) -> Request:
        """A context with its continuations: each is encoded with the context, and cut where that
        ends. Spaces at the end of a context go to the continuation, since most tokenizers have
        them at the beginning of a word.

        Raises:
            MsQuantError: a continuation has no tokens, or there is nothing to go on from.
        """
        if not context:
            return self._without_context(continuations)
        stripped = context.rstrip()
        spaces = context[len(stripped) :]
        first = self.encode(stripped)
        whole = [self.encode(f"{stripped}{spaces}{text}") for text in continuations]
        found = tuple(ids[len(first) :] for ids in whole)
        _require_tokens(found, continuations)
        return Request(first, found)

    def _without_context(self, continuations: Sequence[str]) -> Request:
        prefix = self._prefix()
        found = tuple(self._words.encode(text) for text in continuations)
        _require_tokens(found, continuations)
        begun = [len(ids) > 1 and ids[0] == prefix for ids in found]
        return Request(
            np.array([prefix], np.int32),
            tuple(ids[int(same) :] for ids, same in zip(found, begun, strict=True)),
        )

    def _prefix(self) -> int:
        """What an empty context is: begin of sequence, or its end."""
        begin = self._words.backend.token_to_id(self._bos) if self._bos else None
        found = self._words.eos_id if begin is None else begin
        if found is None:
            raise BadArgumentError(
                f"{self._words.directory}: has neither a begin-of-sequence nor an end-of-sequence "
                "token for a prompt without text, expected one"
            )
        return found


def _require_tokens(found: Sequence[np.ndarray], texts: Sequence[str]) -> None:
    for ids, text in zip(found, texts, strict=True):
        if not len(ids):
            raise BadArgumentError(
                f"the answer {text!r:.80} has no tokens of its own behind its prompt, expected one "
                "at least"
            )
