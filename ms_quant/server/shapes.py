"""The bodies of answers, in OpenAI's shape."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ms_quant.server.answers import Piece, Told
from ms_quant.server.token_text import TokenTexts


@dataclass
class Usage:
    """Counts of tokens.

    Attributes:
        prompt: of all prompts, each once.
        made: new ones of all answers.
    """

    prompt: int
    made: int = 0

    def as_json(self) -> dict[str, int]:
        """The ``usage`` of an answer."""
        total = self.prompt + self.made
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.made,
            "total_tokens": total,
        }


@dataclass(frozen=True)
class CompletionShape:
    """Answers of ``/v1/completions``.

    Attributes:
        model: its name.
        texts: of tokens.
        logprobs: whether likelihoods are told.
    """

    model: str
    texts: TokenTexts
    logprobs: bool
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def opening(self, answers: int) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """All answers at once."""
        return {**self._frame([self._choice(p) for p in pieces]), "usage": usage.as_json()}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A part of a stream."""
        return self._frame([self._choice(piece)])

    def last(self, usage: Usage) -> dict[str, Any]:
        """The count of tokens at the end of a stream."""
        return {**self._frame([]), "usage": usage.as_json()}

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece.tokens) if self.logprobs else None,
            "finish_reason": piece.reason,
        }

    def _logprobs(self, tokens: Sequence[Told]) -> dict[str, Any]:
        return {
            "tokens": [self.texts.text_of(one.found.token) for one in tokens],
            "token_logprobs": [one.found.logprob for one in tokens],
            "top_logprobs": [self._top(one) for one in tokens],
            "text_offset": [one.offset for one in tokens],
        }

    def _top(self, one: Told) -> dict[str, float] | None:
        if one.found.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, logprob in one.found.top:  # two tokens may have one text: the likelier counts
            found.setdefault(self.texts.text_of(token), logprob)
        found.setdefault(self.texts.text_of(one.found.token), one.found.logprob)
        return found


@dataclass(frozen=True)
class ChatShape:
    """Answers of ``/v1/chat/completions``; attributes as of :class:`CompletionShape`."""

    model: str
    texts: TokenTexts
    logprobs: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def opening(self, answers: int) -> list[dict[str, Any]]:
        """What a stream begins with: who speaks, for each answer."""
        return [
            self._frame("chat.completion.chunk", [self._delta(Piece(i), {"role": "assistant"})])
            for i in range(answers)
        ]

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """All answers at once."""
        choices = [
            {
                "index": piece.index,
                "message": {"role": "assistant", "content": piece.text},
                "logprobs": self._logprobs(piece.tokens),
                "finish_reason": piece.reason,
            }
            for piece in pieces
        ]
        return {**self._frame("chat.completion", choices), "usage": usage.as_json()}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A part of a stream."""
        delta = {"content": piece.text} if piece.text or piece.reason is None else {}
        return self._frame("chat.completion.chunk", [self._delta(piece, delta)])

    def last(self, usage: Usage) -> dict[str, Any]:
        """The count of tokens at the end of a stream."""
        return {**self._frame("chat.completion.chunk", []), "usage": usage.as_json()}

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _delta(self, piece: Piece, delta: dict[str, Any]) -> dict[str, Any]:
        return {
            "index": piece.index,
            "delta": delta,
            "logprobs": self._logprobs(piece.tokens) if piece.tokens else None,
            "finish_reason": piece.reason,
        }

    def _logprobs(self, tokens: Sequence[Told]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {
            "content": [
                {
                    **self._one(one.found.token, one.found.logprob),
                    "top_logprobs": [self._one(*top) for top in one.found.top],
                }
                for one in tokens
            ]
        }

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = list(self.texts.bytes_of(token))
        return {"token": self.texts.text_of(token), "logprob": logprob, "bytes": raw}


Shape = CompletionShape | ChatShape
