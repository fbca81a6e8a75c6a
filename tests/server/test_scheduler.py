"""The scheduler without HTTP: who joins, who leaves, what is bounded, the same tokens always."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from ms_quant.evaluation.decoder import Decoder
from ms_quant.server.sampling import Sampling, TokenLogprob, choose, logprobs
from ms_quant.server.scheduler import BusyError, Scheduler, StoppingError
from ms_quant.server.text_request import EndedError, TextRequest

GREEDY = Sampling(temperature=0)


class Heard:
    """A listener that remembers."""

    def __init__(self, until: int = 10**9, told: Callable[[], None] = lambda: None):
        self.tokens: list[int] = []
        self.reason, self.error, self.prompts = "", None, list[TokenLogprob]()
        self.until, self.told, self.done = until, told, threading.Event()

    def prompt(self, found: list[TokenLogprob]) -> None:
        self.prompts = found

    def token(self, found: TokenLogprob) -> bool:
        self.tokens.append(found.token)
        self.told()
        return len(self.tokens) < self.until

    def finished(self, reason: str) -> None:
        self.reason = reason
        self.done.set()

    def failed(self, error: Exception) -> None:
        self.error = error
        self.done.set()


def wanted(prompt: list[int], count: int = 6, heard: Heard | None = None, **more) -> TextRequest:
    options = {"sampling": GREEDY, **more}
    return TextRequest(np.array(prompt), count, heard or Heard(), **options)


def drained(scheduler: Scheduler) -> None:
    for _ in range(1000):
        load = scheduler.load()
        if not load.running and not load.waiting:
            return
        scheduler.turn()
    raise AssertionError("texts are left")


def alone(decoder: Decoder, prompt: list[int], count: int, sampling: Sampling = GREEDY) -> list:
    request = wanted(prompt, count, sampling=sampling)
    scheduler = Scheduler(decoder, 1000)
    scheduler.submit([request])
    drained(scheduler)
    return request.listener.tokens


def test_any_company_any_tokens(decoder):
    """Texts that come, end and are given up at random steps; greedy and drawn."""
    rng = np.random.default_rng(0)
    kinds = GREEDY, Sampling(0.8, 0.9, seed=5), Sampling(1.2, top_k=7, seed=9)
    scheduler = Scheduler(decoder, 60, batch=5)
    requests: list[TextRequest] = []
    while len(requests) < 30 or scheduler.load().running or scheduler.load().waiting:
        if len(requests) < 30 and rng.random() < 0.6:
            prompt = rng.integers(0, 300, rng.integers(1, 20)).tolist()
            kind = kinds[rng.integers(len(kinds))]
            requests.append(wanted(prompt, int(rng.integers(1, 9)), sampling=kind))
            scheduler.submit(requests[-1:])
        if requests and rng.random() < 0.05:
            requests[rng.integers(len(requests))].cancel()
        scheduler.turn()
        load = scheduler.load()
        assert load.running <= 5 and load.cached <= 60
        assert load.cached == sum(one.request.room for one in scheduler._running)
    assert any(request.cancelled for request in requests)
    for request in requests:
        expected = alone(decoder, request.prompt.tolist(), request.max_tokens, request.sampling)
        heard = request.listener
        if request.cancelled and isinstance(heard.error, EndedError):
            assert heard.tokens == expected[: len(heard.tokens)]
        else:
            assert heard.tokens == expected and heard.reason == "length"


def test_texts_join_while_others_run(decoder):
    first, second = wanted([1, 2, 3], 20), wanted([4, 5], 3)
    scheduler = Scheduler(decoder, 1000)
    scheduler.submit([first])
    for _ in range(5):
        scheduler.turn()
    scheduler.submit([second])
    scheduler.turn()
    assert len(second.listener.tokens) == 2  # of its prompt, and of the step that it joined
    assert scheduler.load().running == 2
    drained(scheduler)


def test_they_join_in_the_order_in_which_they_came(decoder):
    """A small one does not overtake a large one that has to wait for room."""
    scheduler = Scheduler(decoder, 30)
    running, large, small = wanted([1] * 10, 6), wanted([1] * 20, 6), wanted([1], 2)
    for one in (running, large, small):
        scheduler.submit([one])
    while running.listener.reason == "":
        scheduler.turn()
        assert not small.listener.tokens
    drained(scheduler)
    assert large.listener.reason == small.listener.reason == "length"


def test_the_queue_has_an_end(decoder):
    scheduler = Scheduler(decoder, 1000, batch=1, queue=2)
    several = [wanted([1], 3) for _ in range(5)]
    scheduler.submit(several)  # one request of five texts
    scheduler.submit([wanted([1], 3)])
    with pytest.raises(BusyError):
        scheduler.submit([wanted([1], 3)])
    drained(scheduler)
    assert all(one.listener.reason == "length" for one in several)


def test_what_takes_too_long_ends(decoder):
    now = [0.0]
    late = wanted([1, 2], 50, deadline=5.0, clock=lambda: now[0])
    waiting = wanted([1, 2], 50, deadline=1.0, clock=lambda: now[0])
    scheduler = Scheduler(decoder, 1000, batch=1)
    scheduler.submit([late])
    scheduler.submit([waiting])
    scheduler.turn()
    now[0] = 2.0
    scheduler.turn()
    assert isinstance(waiting.listener.error, TimeoutError) and not waiting.listener.tokens
    now[0] = 6.0
    scheduler.turn()
    assert isinstance(late.listener.error, TimeoutError) and len(late.listener.tokens) == 3
    assert scheduler.load().cached == 0


def test_a_prompt_whose_client_has_gone_is_not_computed_to_its_end(decoder):
    request = wanted(list(range(20)))
    blocks, first = [], decoder.first[0]
    decoder.first = [
        lambda *a: (blocks.append(1), request.cancel(), first(*a))[2],
        decoder.first[1],
    ]
    scheduler = Scheduler(decoder, 1000)
    scheduler.submit([request])
    scheduler.turn()
    assert isinstance(request.listener.error, EndedError) and len(blocks) == 1
    assert scheduler.load().running == scheduler.load().cached == 0


def test_a_text_that_breaks_breaks_no_other(decoder):
    bad = wanted([1, 2], 5)
    bad.listener.token = lambda found: 1 / 0
    good = wanted([1, 2], 5)
    scheduler = Scheduler(decoder, 1000)
    scheduler.submit([bad])
    scheduler.submit([good])
    drained(scheduler)
    assert isinstance(bad.listener.error, ZeroDivisionError)
    assert good.listener.tokens == alone(decoder, [1, 2], 5)


def test_neither_a_panic_nor_a_listener_that_breaks_ends_the_thread(decoder):
    class PanicError(BaseException):
        """As the tokenizers library raises them."""

    def broken(*arguments):
        raise PanicError

    bad = [wanted([1, 2], 3) for _ in range(3)]
    bad[0].listener.token = broken
    bad[1].listener.finished = broken
    bad[2].listener.finished = bad[2].listener.failed = broken
    good = wanted([1, 2], 3)
    scheduler = Scheduler(decoder, 1000)
    scheduler.submit([*bad, good])
    drained(scheduler)
    assert all(isinstance(one.listener.error, PanicError) for one in bad[:2])
    assert good.listener.tokens == alone(decoder, [1, 2], 3)


def test_stops(decoder):
    tokens = alone(decoder, [1, 2, 3], 6)
    ended = wanted([1, 2, 3], 6, stops=frozenset([tokens[2]]))
    heard = wanted([1, 2, 3], 6, Heard(until=2))
    scheduler = Scheduler(decoder, 1000)
    scheduler.submit([ended, heard])
    drained(scheduler)
    assert ended.listener.tokens == tokens[: tokens.index(tokens[2])]
    assert heard.listener.tokens == tokens[:2]
    assert ended.listener.reason == heard.listener.reason == "stop"


@pytest.mark.parametrize("grace", [0.0, 30.0])
def test_the_end(decoder, grace):
    """What runs may finish for a while, or is ended; what waits is told at once."""
    begun = threading.Event()
    running = wanted([1], 400, Heard(told=begun.set))
    waiting = wanted([1], 2)
    scheduler = Scheduler(decoder, 1000, batch=1)
    scheduler.start()
    scheduler.submit([running])
    scheduler.submit([waiting])
    assert begun.wait(10) and scheduler.working
    started = time.monotonic()
    scheduler.stop(grace)
    assert not scheduler.working and time.monotonic() - started < 10
    assert isinstance(waiting.listener.error, StoppingError)
    if grace:
        assert running.listener.reason == "length" and len(running.listener.tokens) == 400
    else:
        assert isinstance(running.listener.error, StoppingError)
    with pytest.raises(StoppingError):
        scheduler.submit([wanted([1])])


def test_likelihoods_are_those_of_the_definition(decoder):
    prompt = list(range(5, 25))
    request = wanted(prompt, 2, top=3, of_prompt=True)
    scheduler = Scheduler(decoder, 1000)
    scheduler.submit([request])
    drained(scheduler)
    logits = decoder.prefill_all(decoder.begin(), np.array(prompt))(slice(0, 20)).astype(float)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = request.listener.prompts
    assert [one.token for one in found] == prompt and found[0].logprob is None
    for at in range(1, 20):
        assert found[at].logprob == pytest.approx(expected[at - 1, prompt[at]], abs=1e-5)
        assert [token for token, _ in found[at].top] == list(np.argsort(-expected[at - 1])[:3])


def test_draws_have_the_probabilities_that_were_asked_for():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))

    def shares(sampling: Sampling) -> np.ndarray:
        rng = sampling.generator()
        drawn = [choose(logits, sampling, rng) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / 4000

    assert np.abs(shares(Sampling(seed=0)) - [0.5, 0.3, 0.15, 0.05]).max() < 0.03
    assert np.abs(shares(Sampling(top_p=0.7, seed=1)) - [0.625, 0.375, 0, 0]).max() < 0.03
    assert np.abs(shares(Sampling(top_k=3, seed=2)) - np.array([50, 30, 15, 0]) / 95).max() < 0.03
    hot = np.sqrt([0.5, 0.3, 0.15, 0.05])
    assert np.abs(shares(Sampling(2.0, seed=3)) - hot / hot.sum()).max() < 0.03
    assert shares(Sampling(0))[0] == 1
    assert shares(Sampling(1e-9, seed=1))[0] == 1 and shares(Sampling(top_p=1e-9, seed=1))[0] == 1
    assert logprobs(np.array([[-np.inf, 0]], np.float32), [0], 2)[0].logprob == -9999
