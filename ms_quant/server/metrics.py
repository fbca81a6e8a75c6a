"""What the server counts, for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ms_quant.server.scheduler import Scheduler
from ms_quant.server.text_request import TextRequest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
TEXTS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server; they are also the watcher of its scheduler."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        to: Any = {"registry": self.registry, "namespace": "ms_quant"}
        self.requests = Counter("requests", "Requests by path and status", ["path", "status"], **to)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts that were computed", **to)
        self.new_tokens = Counter("generation_tokens", "Tokens that were made in steps", **to)
        self.batch = Histogram("step_texts", "Texts that a step computed", buckets=TEXTS, **to)
        self.first = Histogram(
            "time_to_first_token_seconds",
            "From a request to its first token",
            buckets=SECONDS,
            **to,
        )
        self.whole = Histogram(
            "request_seconds", "From a request to the end of its answer", buckets=SECONDS, **to
        )
        self.running = Gauge("texts_running", "Texts in the batch", **to)
        self.waiting = Gauge("texts_waiting", "Texts that wait", **to)
        self.cached = Gauge("cache_tokens_reserved", "Tokens of the cache that texts have", **to)
        self.capacity = Gauge("cache_tokens", "Tokens of the cache", **to)

    def prefilled(self, request: TextRequest) -> None:
        """A text has joined, and its prompt is computed."""
        self.prompt_tokens.inc(len(request.prompt))
        if request.max_tokens:
            self.new_tokens.inc()

    def stepped(self, texts: int) -> None:
        """So many texts got one token each."""
        self.new_tokens.inc(texts)
        self.batch.observe(texts)

    def text(self, scheduler: Scheduler) -> bytes:
        """What ``/metrics`` gives out."""
        load = scheduler.load()
        self.running.set(load.running)
        self.waiting.set(load.waiting)
        self.cached.set(load.cached)
        self.capacity.set(scheduler.cache_tokens)
        return generate_latest(self.registry)
