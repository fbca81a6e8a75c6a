"""Texts join and leave a running batch at any step; one thread computes.

A text has room for its prompt and all its new tokens from the moment that it joins, so none is ever
driven out by others, and the memory of all is bounded. They join in the order in which they came.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ms_quant.evaluation.decoder import DecodedText, Decoder
from ms_quant.server.sampling import TokenLogprob, choose, logprobs
from ms_quant.server.text_request import END, LENGTH, EndedError, TextRequest

LOG = logging.getLogger("ms_quant.server")
LOGIT_BYTES = 32 << 20  # of the logits of a prompt that are held at a time


class BusyError(Exception):
    """Too many requests wait already."""


class StoppingError(Exception):
    """The server stops."""


class Watcher(Protocol):
    """Who counts."""

    def prefilled(self, request: TextRequest) -> None:
        """A text has joined, and its prompt is computed."""

    def stepped(self, texts: int) -> None:
        """So many texts got one token each."""


class Unwatched:
    """Nobody counts."""

    def prefilled(self, request: TextRequest) -> None: ...

    def stepped(self, texts: int) -> None: ...


@dataclass(eq=False)
class Running:
    """A text in the batch.

    Attributes:
        request: what was asked for.
        text: its caches.
        rng: what draws its tokens.
        last: its newest token, which no cache has yet.
        made: how many new tokens it has.
    """

    request: TextRequest
    text: DecodedText
    rng: np.random.Generator
    last: int = -1
    made: int = 0


@dataclass(frozen=True)
class Load:
    """What a scheduler has to do at a moment.

    Attributes:
        running: texts in the batch.
        waiting: texts that wait.
        cached: tokens of the cache that texts have reserved.
    """

    running: int
    waiting: int
    cached: int


@dataclass(eq=False)
class _Waiting:
    request: TextRequest
    group: int = field(default=0)


class Scheduler:
    """What computes the texts of all clients.

    Args:
        decoder: the model.
        cache_tokens: that all texts in the batch may have together.
        batch: at most so many texts are computed at once.
        queue: at most so many requests wait, each of one text or several.
        watcher: who counts.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache_tokens: int,
        batch: int = 32,
        queue: int = 64,
        watcher: Watcher | None = None,
    ):
        self.decoder, self.cache_tokens, self.batch, self.queue = (
            decoder,
            cache_tokens,
            batch,
            queue,
        )
        self._watcher = watcher or Unwatched()
        self._waiting: deque[_Waiting] = deque()
        self._running: list[Running] = []
        self._cached = self._groups = 0
        self._changed = threading.Condition()
        self._closing = self._stopped = False
        self._thread = threading.Thread(target=self._work, name="ms-quant-model", daemon=True)

    def start(self) -> None:
        """Begins to compute, in a thread of its own."""
        self._thread.start()

    def submit(self, requests: Sequence[TextRequest]) -> None:
        """Queues the texts of one request; from any thread.

        Raises:
            BusyError: too many requests wait.
            StoppingError: the server stops.
        """
        with self._changed:
            if self._closing:
                raise StoppingError
            groups = {waiting.group for waiting in self._waiting}
            if len(groups) >= self.queue:
                raise BusyError
            self._groups += 1
            self._waiting.extend(_Waiting(request, self._groups) for request in requests)
            self._changed.notify_all()

    def load(self) -> Load:
        """What there is to do now."""
        with self._changed:
            return Load(len(self._running), len(self._waiting), self._cached)

    def close(self) -> None:
        """Takes nothing more, and fails what waits; what runs goes on."""
        with self._changed:
            self._closing = True
            waiting, self._waiting = list(self._waiting), deque()
            self._changed.notify_all()
        for one in waiting:
            _fail(one.request, StoppingError())

    @property
    def working(self) -> bool:
        """Whether texts are taken and computed."""
        return self._thread.is_alive() and not self._closing

    def cut(self) -> None:
        """Ends what runs at once."""
        self._stopped = True

    def stop(self, seconds: float) -> None:
        """Takes nothing more, lets what runs finish for so long, and ends the rest."""
        self.close()
        self._thread.join(max(seconds, 0.0))
        self.cut()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._closing)
                if not self._waiting and not self._running and self._closing:
                    return
            self.turn()

    def turn(self) -> None:
        """Lets one text join, if one may, and takes a step with all that are in the batch."""
        if self._stopped:
            for one in self._running[:]:
                self._leave(one, StoppingError())
            return
        self._drop()
        request = self._next()
        if request is not None:
            self._join(request)
        if self._running:
            self._step()

    def _drop(self) -> None:
        """Lets go of texts that nobody waits for any more."""
        with self._changed:
            over = [(one, error) for one in self._waiting if (error := _over(one.request))]
            for waiting, _ in over:
                self._waiting.remove(waiting)
        for waiting, error in over:
            _fail(waiting.request, error)
        for running in self._running[:]:
            if gone := _over(running.request):
                self._leave(running, gone)

    def _next(self) -> TextRequest | None:
        with self._changed:
            if not self._waiting or len(self._running) >= self.batch:
                return None
            request = self._waiting[0].request
            if self._cached + request.room > self.cache_tokens and self._running:
                return None
            self._waiting.popleft()
            self._cached += request.room
            return request

    def _join(self, request: TextRequest) -> None:
        one = Running(
            request, self.decoder.begin(request.room), request.sampling.generator(request.index)
        )
        with self._changed:
            self._running.append(one)
        try:
            logits = self._prefill(one)
            self._watcher.prefilled(request)
        except BaseException as error:
            self._leave(one, error)
            return
        self._take(one, logits)

    def _prefill(self, one: Running) -> np.ndarray:
        request, check = one.request, self._check(one.request)
        if not request.of_prompt:
            return self.decoder.prefill(one.text, request.prompt, check)
        logits_of = self.decoder.prefill_all(one.text, request.prompt, check)
        ids, count = request.prompt.tolist(), len(request.prompt)
        found = [TokenLogprob(ids[0], None)]
        each = max(1, LOGIT_BYTES // (4 * self.decoder.config.vocab_size))
        for start in range(0, count - 1, each):
            check()
            part = slice(start, min(start + each, count - 1))
            targets = ids[part.start + 1 : part.stop + 1]
            found += logprobs(logits_of(part), targets, request.top or 0)
        request.listener.prompt(found)
        return logits_of(slice(count - 1, count))[0]

    def _check(self, request: TextRequest) -> Callable[[], None]:
        def check() -> None:
            if self._stopped:
                raise StoppingError
            request.require_wanted()

        return check

    def _step(self) -> None:
        running = self._running[:]
        try:
            rows = self.decoder.step([one.last for one in running], [one.text for one in running])
        except BaseException as error:
            for one in running:
                self._leave(one, error)
            return
        self._watcher.stepped(len(running))
        for one, logits in zip(running, rows, strict=True):
            self._take(one, logits)

    def _take(self, one: Running, logits: np.ndarray) -> None:
        """Draws the next token of a text and tells it."""
        try:
            reason = self._ending(one, logits)
        except BaseException as error:  # also the panics of a tokenizer, which are no Exception
            self._leave(one, error)
            return
        if reason is not None:
            self._leave(one, reason=reason)

    def _ending(self, one: Running, logits: np.ndarray) -> str | None:
        """Why a text ends with its next token, if it does."""
        request = one.request
        if request.max_tokens == 0:
            return LENGTH
        token = choose(logits, request.sampling, one.rng)
        if token in request.stops:
            return END
        one.last, one.made = token, one.made + 1
        found = TokenLogprob(token, None)
        if request.top is not None:
            found = logprobs(logits[None], [token], request.top)[0]
        if not request.listener.token(found):
            return END
        return LENGTH if one.made >= request.max_tokens else None

    def _leave(self, one: Running, error: BaseException | None = None, reason: str = END) -> None:
        with self._changed:
            self._running.remove(one)
            self._cached -= one.request.room
        try:
            if error is None:
                one.request.listener.finished(reason)
        except BaseException as broken:
            error = broken
        if error is not None:
            _fail(one.request, error)


def _fail(request: TextRequest, error: BaseException) -> None:
    """Tells that there will be no more; the thread goes on whatever becomes of that."""
    try:
        request.listener.failed(error)
    except BaseException as broken:
        LOG.error("nobody could be told", exc_info=broken)


def _over(request: TextRequest) -> Exception | None:
    try:
        request.require_wanted()
    except (EndedError, TimeoutError) as error:
        return error
    return None
