"""A checkpoint is loaded, served, and the server stopped in good order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ms_quant.data.tokenizer import ModelTokenizer
from ms_quant.errors import BadArgumentError
from ms_quant.evaluation.decoder import Decoder
from ms_quant.server.options import ServerOptions

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from ms_quant.server.scheduler import Scheduler

CACHE_BYTES = 1 << 30  # of keys and values, where nothing is said
MOST_CONTEXTS = 16  # as many texts of full length, at most, where nothing is said


def token_bytes(decoder: Decoder) -> int:
    """What a token takes in the caches of all blocks."""
    text = decoder.begin(1)
    decoder.prefill(text, np.zeros(1, np.int64))
    return sum(cache.token_bytes for cache in text.caches)


def cache_tokens(decoder: Decoder, options: ServerOptions) -> int:
    """How many tokens the caches of all texts may hold.

    Raises:
        MsQuantError: fewer than two were asked for.
    """
    if options.cache_tokens is not None:
        if options.cache_tokens < 2:
            raise BadArgumentError(
                f"--kv-cache-tokens is {options.cache_tokens}, expected at least 2"
            )
        return options.cache_tokens
    most = MOST_CONTEXTS * decoder.config.longest
    return max(2, min(most, CACHE_BYTES // token_bytes(decoder)))


def listening(host: str, port: int) -> socket.socket:
    """A socket that a server can use.

    Raises:
        MsQuantError: the port is in use, or the address cannot be listened on.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind)
    except OSError as error:
        raise BadArgumentError(f"--host {host}: {error.strerror or error}") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise BadArgumentError(
                f"port {port} of {host} is in use, expected another --port"
            ) from None
        raise BadArgumentError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return found


def serve(
    decoder: Decoder,
    tokenizer: ModelTokenizer,
    options: ServerOptions,
    sock: socket.socket,
    ready: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Serves a checkpoint until SIGTERM or SIGINT comes; running requests may end first.

    Args:
        decoder: the checkpoint.
        tokenizer: its tokenizer.
        options: of the server.
        sock: as :func:`listening` made it.
        ready: is called with the tokens of the cache when requests are taken.

    Raises:
        MsQuantError: the extra is not installed.
    """
    require_extra()
    from ms_quant.server.app import Api
    from ms_quant.server.metrics import Metrics
    from ms_quant.server.scheduler import Scheduler
    from ms_quant.server.service import Preparer

    tokens, metrics = cache_tokens(decoder, options), Metrics()
    scheduler = Scheduler(decoder, tokens, options.batch, options.queue, metrics)
    own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    ends = frozenset([*decoder.config.eos_token_ids, *own])
    preparer = Preparer(decoder.config, tokenizer, options, tokens, ends)
    app = Api(scheduler, preparer, options, metrics).app()
    scheduler.start()
    try:
        asyncio.run(_serve(app, sock, scheduler, options, lambda: ready(tokens)))
    finally:
        scheduler.stop(0)


def require_extra() -> None:
    """Refuses to go on without what the server is built on.

    Raises:
        MsQuantError: something is not installed.
    """
    try:
        import prometheus_client
        import starlette
        import uvicorn
    except ImportError as error:
        raise BadArgumentError(
            f"serve needs {error.name}, which is missing: pip install 'ms-quant[server]'"
        ) from None
    assert prometheus_client and starlette and uvicorn


async def _serve(
    app: Starlette,
    sock: socket.socket,
    scheduler: Scheduler,
    options: ServerOptions,
    ready: Callable[[], None],
) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # signals are taken below, and end in status 0

    server = Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=1024,
            timeout_graceful_shutdown=int(options.grace) + 5,
        )
    )

    def stop() -> None:
        if server.should_exit:
            scheduler.cut()  # a second signal: nothing is waited for
            return
        server.should_exit = True
        threading.Thread(target=scheduler.stop, args=(options.grace,), daemon=True).start()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError, ValueError):
            loop.add_signal_handler(number, stop)
    ready()
    await server.serve(sockets=[sock])
