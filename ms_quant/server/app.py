"""The routes of the server, and how answers reach clients."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ms_quant.errors import MsQuantError
from ms_quant.server.answers import Piece
from ms_quant.server.metrics import Metrics
from ms_quant.server.options import ServerOptions
from ms_quant.server.protocol import ChatRequest, CompletionRequest, read_body
from ms_quant.server.replies import RefusedError, busy, internal, stopping, too_late
from ms_quant.server.scheduler import BusyError, Scheduler, StoppingError
from ms_quant.server.service import Prepared, Preparer
from ms_quant.server.shapes import Usage
from ms_quant.server.text_request import EndedError

LOG = logging.getLogger("ms_quant.server")
GONE = 499  # nobody reads the answer
Handler = Callable[[Request], Awaitable[Response]]


class Api:
    """What the routes do.

    Args:
        scheduler: computes texts.
        preparer: makes texts of requests.
        options: of the server.
        metrics: counts.
    """

    def __init__(
        self, scheduler: Scheduler, preparer: Preparer, options: ServerOptions, metrics: Metrics
    ):
        self.scheduler, self.preparer = scheduler, preparer
        self.options, self.metrics = options, metrics
        self.started = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = {
            "/v1/models": (self.models, "GET", True),
            "/v1/models/{name:path}": (self.model, "GET", True),
            "/v1/completions": (self.completions, "POST", True),
            "/v1/chat/completions": (self.chat, "POST", True),
            "/health": (self.health, "GET", False),
            "/metrics": (self.numbers, "GET", False),
        }
        return Starlette(
            routes=[
                Route(path, partial(self._guarded, path, route, keyed), methods=[method])
                for path, (route, method, keyed) in routes.items()
            ],
            exception_handlers={HTTPException: _no_route},
        )

    async def _guarded(self, path: str, route: Handler, keyed: bool, request: Request) -> Response:
        """Checks the key, counts, and makes an answer of whatever goes wrong."""
        try:
            if keyed:
                self._require_key(request)
            response = await route(request)
        except RefusedError as refusal:
            response = _refused(refusal)
        except ClientDisconnect:
            response = Response(status_code=GONE)
        except Exception as error:
            LOG.exception("%s failed", path, exc_info=error)
            response = _refused(internal())
        self.metrics.requests.labels(path, str(response.status_code)).inc()
        return response

    def _require_key(self, request: Request) -> None:
        key = self.options.api_key
        if key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), key.encode())
        if kind.lower() != "bearer" or not right:
            raise RefusedError(
                "the API key is missing or wrong, expected Authorization: Bearer KEY",
                401,
                "authentication_error",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def health(self, request: Request) -> Response:
        """Whether texts are computed."""
        if not self.scheduler.working:
            raise stopping()
        return JSONResponse({"status": "ok"})

    async def numbers(self, request: Request) -> Response:
        """What was counted, for Prometheus."""
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self.metrics.text(self.scheduler), headers={"content-type": kind})

    async def models(self, request: Request) -> Response:
        """The one model, by all its names."""
        return JSONResponse({"object": "list", "data": list(map(self._model, self.options.names))})

    async def model(self, request: Request) -> Response:
        """The model by one of its names."""
        name = request.path_params["name"]
        if name not in self.options.names:
            raise RefusedError(f"there is no model {name!r:.100}", 404, param="model")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "ms-quant",
            "max_model_len": min(self.preparer.config.longest, self.scheduler.cache_tokens),
        }

    async def completions(self, request: Request) -> Response:
        """A text goes on."""

        def prepare(raw: bytes, *told: Any) -> Prepared:
            return self.preparer.completion(read_body(CompletionRequest, raw), *told)

        return await self._answer(request, prepare)

    async def chat(self, request: Request) -> Response:
        """The assistant answers."""

        def prepare(raw: bytes, *told: Any) -> Prepared:
            return self.preparer.chat(read_body(ChatRequest, raw), *told)

        return await self._answer(request, prepare)

    async def _answer(self, request: Request, prepare: Callable[..., Prepared]) -> Response:
        started = time.monotonic()
        raw = await self._body(request)
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def post(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def begun() -> None:
            self.metrics.first.observe(time.monotonic() - started)

        prepared = await run_in_threadpool(_caught, prepare, raw, post, begun)
        try:
            self.scheduler.submit(prepared.texts)
        except BusyError:
            raise busy(self.options.queue) from None
        except StoppingError:
            raise stopping() from None
        watch = asyncio.create_task(_watch(request, prepared))
        try:
            if not prepared.streams:
                response = await self._whole(prepared, pieces)
                self.metrics.whole.observe(time.monotonic() - started)
                return response
            first = await self._next(pieces)
        except BaseException:
            _cancel(prepared)
            raise
        finally:
            watch.cancel()
        return StreamingResponse(
            self._stream(prepared, first, pieces, started), media_type="text/event-stream"
        )

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a page of another site may send without being asked
            raise RefusedError(
                f"Content-Type is {kind or 'missing'!r:.60}, expected application/json", 415
            )
        return await asyncio.wait_for(self._limited(request), self.options.timeout)

    async def _limited(self, request: Request) -> bytes:
        most, found = self.options.body_bytes, bytearray()
        async for part in request.stream():
            found += part
            if len(found) > most:
                raise RefusedError(f"the body is larger than {most} bytes", 413)
        return bytes(found)

    async def _next(self, pieces: asyncio.Queue[Piece]) -> Piece:
        piece = await pieces.get()
        if piece.error is not None:
            raise self._refusal(piece.error)
        return piece

    def _refusal(self, error: BaseException) -> RefusedError:
        if isinstance(error, StoppingError):
            return stopping()
        if isinstance(error, TimeoutError):
            return too_late(self.options.timeout)
        if isinstance(error, EndedError):
            return RefusedError("the client has gone", GONE)
        if isinstance(error, MsQuantError):
            return RefusedError(str(error), 500, "server_error")
        LOG.error("a text failed", exc_info=error)
        return internal()

    async def _whole(self, prepared: Prepared, pieces: asyncio.Queue[Piece]) -> Response:
        found: dict[int, Piece] = {}
        while len(found) < len(prepared.texts):
            piece = await self._next(pieces)
            found[piece.index] = piece
        every = [found[index] for index in sorted(found)]
        usage = Usage(prepared.prompt_tokens, sum(piece.made for piece in every))
        body = await run_in_threadpool(lambda: _json(prepared.shape.whole(every, usage)))
        return Response(body, media_type="application/json")

    async def _stream(
        self, prepared: Prepared, piece: Piece, pieces: asyncio.Queue[Piece], started: float
    ) -> AsyncIterator[bytes]:
        usage, open_texts = Usage(prepared.prompt_tokens), len(prepared.texts)
        try:
            for chunk in prepared.shape.opening(open_texts):
                yield _event(chunk)
            while True:
                usage.made += piece.made
                yield _event(prepared.shape.chunk(piece))
                open_texts -= piece.reason is not None
                if not open_texts:
                    break
                piece = await self._next(pieces)
            self.metrics.whole.observe(time.monotonic() - started)
            if prepared.usage:
                yield _event(prepared.shape.last(usage))
        except RefusedError as refusal:
            yield _event(refusal.as_json())
        finally:
            _cancel(prepared)
        yield b"data: [DONE]\n\n"


def _caught(prepare: Callable[..., Prepared], *arguments: Any) -> Prepared:
    """What ``prepare`` gives; a panic of a tokenizer, which is no Exception, becomes one."""
    try:
        return prepare(*arguments)
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _cancel(prepared: Prepared) -> None:
    for text in prepared.texts:
        text.cancel()


async def _watch(request: Request, prepared: Prepared) -> None:
    """Ends texts whose client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    _cancel(prepared)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _event(value: Any) -> bytes:
    return b"data: " + _json(value) + b"\n\n"


def _refused(refusal: RefusedError) -> Response:
    return JSONResponse(refusal.as_json(), refusal.status, headers=refusal.headers)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path:.100} is not served here"
    return _refused(RefusedError(text, error.status_code, headers=dict(error.headers or {})))
