"""``ms-quant serve``: a checkpoint behind OpenAI's API."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from ms_quant.cli.arguments import CacheOption, CheckpointArgument
from ms_quant.cli.console import block_progress, note
from ms_quant.cli.running import opened
from ms_quant.server.options import ServerOptions

DEFAULTS = ServerOptions()
KEY = "MS_QUANT_API_KEY"


def serve(
    checkpoint: CheckpointArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = DEFAULTS.host,
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = DEFAULTS.port,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="What clients call the model; several times for several names. "
            "Default: the directory's name and path"
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help=f"What clients must send as a bearer token. Default: ${KEY}, or nothing"),
    ] = None,
    kv_cache: CacheOption = None,
    kv_cache_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens that all texts may have cached together. Default: 1 GiB of them"),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(help="At most so many texts are computed at once.", min=1)
    ] = DEFAULTS.batch,
    max_queue: Annotated[
        int, typer.Option(help="At most so many requests wait; more get 503.", min=1)
    ] = DEFAULTS.queue,
    max_tokens: Annotated[
        int | None, typer.Option(help="New tokens of a text, at most. Default: what fits", min=1)
    ] = None,
    max_texts: Annotated[
        int, typer.Option(help="Prompts times answers of a request, at most.", min=1)
    ] = DEFAULTS.max_texts,
    max_body_bytes: Annotated[
        int, typer.Option(help="Bytes of a request's body, at most.", min=1)
    ] = DEFAULTS.body_bytes,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a request may take, waiting and all.")
    ] = DEFAULTS.timeout,
    grace: Annotated[
        float, typer.Option(help="Seconds that running requests get when the server stops.", min=0)
    ] = DEFAULTS.grace,
) -> None:
    """An OpenAI-compatible server on the CPU, until SIGTERM or Ctrl-C."""
    from ms_quant.data.tokenizer import load_tokenizer
    from ms_quant.evaluation.decoder import Decoder
    from ms_quant.server import run

    run.require_extra()
    tokenizer = load_tokenizer(checkpoint)
    names = served_model_name or list(dict.fromkeys([checkpoint.resolve().name, str(checkpoint)]))
    options = ServerOptions(
        host,
        port,
        tuple(names),
        os.environ.get(KEY) if api_key is None else api_key,
        kv_cache_tokens,
        batch=max_batch,
        queue=max_queue,
        max_tokens=max_tokens,
        max_texts=max_texts,
        body_bytes=max_body_bytes,
        timeout=timeout,
        grace=grace,
    )
    with run.listening(host, port) as sock:  # a port in use is told before the model is read
        model = opened(checkpoint)
        with block_progress("loading", model.config.num_layers) as progress:
            decoder = Decoder(model, kv_cache, progress)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{sock.getsockname()[1]}"

        def ready(tokens: int) -> None:
            size = tokens * run.token_bytes(decoder) / (1 << 20)
            note(
                f"{names[0]} is served at {address}/v1, with room for {tokens:,} tokens "
                f"({size:,.0f} MB) of keys and values. Ctrl-C stops it."
            )

        run.serve(decoder, tokenizer, options, sock, ready)
    note("stopped")
