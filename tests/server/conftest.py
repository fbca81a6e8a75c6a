"""A small model behind the API, without a socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from ms_quant.data.tokenizer import load_tokenizer
from ms_quant.evaluation.decoder import Decoder
from ms_quant.formats.opening import open_model
from ms_quant.server.app import Api
from ms_quant.server.metrics import Metrics
from ms_quant.server.options import ServerOptions
from ms_quant.server.run import cache_tokens
from ms_quant.server.scheduler import Scheduler
from ms_quant.server.service import Preparer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def decoder(tiny_model: Callable[..., Path]) -> Decoder:
    directory = tiny_model(family="qwen3", layers=2)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    found = Decoder(open_model(directory))
    found.directory = directory  # type: ignore[attr-defined]
    return found


@pytest.fixture
def client(decoder: Decoder) -> Iterator[Callable[..., TestClient]]:
    """A client of a server with some options; nothing ends a text early unless it is asked to."""
    schedulers: list[Scheduler] = []

    def make(ends: tuple[int, ...] = (), **options: Any) -> TestClient:
        chosen = ServerOptions(names=("tiny", "other"), **options)
        tokenizer, metrics = load_tokenizer(decoder.directory), Metrics()
        tokens = cache_tokens(decoder, chosen)
        scheduler = Scheduler(decoder, tokens, chosen.batch, chosen.queue, metrics)
        schedulers.append(scheduler)
        preparer = Preparer(decoder.config, tokenizer, chosen, tokens, frozenset(ends))
        scheduler.start()
        found = TestClient(Api(scheduler, preparer, chosen, metrics).app())
        found.scheduler, found.tokenizer = scheduler, tokenizer  # type: ignore[attr-defined]
        return found

    yield make
    for scheduler in schedulers:
        scheduler.stop(0)
