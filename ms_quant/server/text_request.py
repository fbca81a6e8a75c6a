"""One text that a client asks for, and who is told what becomes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ms_quant.server.sampling import Sampling, TokenLogprob

END, LENGTH = "stop", "length"


class Listener(Protocol):
    """Who is told, in the thread that computes. Nothing here may take long."""

    def prompt(self, found: list[TokenLogprob]) -> None:
        """How likely the tokens of the prompt were."""

    def token(self, found: TokenLogprob) -> bool:
        """A new token; whether the text goes on."""

    def finished(self, reason: str) -> None:
        """The text is whole, for one of ``END`` and ``LENGTH``."""

    def failed(self, error: BaseException) -> None:
        """There will be no more of it."""


class EndedError(Exception):
    """Nobody wants a text any more."""


@dataclass(eq=False)
class TextRequest:
    """A text that is asked for.

    Attributes:
        prompt: token ids, int64, at least one.
        max_tokens: at most so many new tokens.
        listener: who is told.
        sampling: how tokens are drawn.
        index: which of several answers to one prompt it is.
        stops: tokens that end it.
        top: how many most likely tokens are told of each; None where no likelihoods are asked for.
        of_prompt: whether the likelihoods of the prompt's tokens are told, too.
        deadline: of ``time.monotonic``.
    """

    prompt: np.ndarray
    max_tokens: int
    listener: Listener
    sampling: Sampling = field(default_factory=Sampling)
    index: int = 0
    stops: frozenset[int] = frozenset()
    top: int | None = None
    of_prompt: bool = False
    deadline: float = float("inf")
    clock: Callable[[], float] = time.monotonic
    _cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def room(self) -> int:
        """How many tokens it has at most; the last one is never cached."""
        return len(self.prompt) + max(self.max_tokens - 1, 0)

    def cancel(self) -> None:
        """Nobody wants it any more; from any thread."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def require_wanted(self) -> None:
        """Raises what ends it, if something does."""
        if self.cancelled:
            raise EndedError
        if self.clock() > self.deadline:
            raise TimeoutError
