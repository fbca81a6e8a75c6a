"""How a server is run."""

from __future__ import annotations

from dataclasses import dataclass

from ms_quant.errors import BadArgumentError

LOCAL = "127.0.0.1"


@dataclass(frozen=True)
class ServerOptions:
    """Attributes:
    host: address to listen on.
    port: port to listen on; 0 for any that is free.
    names: what clients may call the model; the first is what it is called.
    api_key: what clients must send as a bearer token; None for nothing.
    cache_tokens: that all texts in the batch may have together; None for a GiB of them.
    batch: texts that are computed at once, at most.
    queue: requests that wait, at most.
    max_tokens: new tokens of a text, at most; None for what fits.
    max_texts: texts of one request, at most: prompts times answers.
    body_bytes: of a request, at most.
    timeout: seconds that a request may take, waiting and all.
    grace: seconds that running requests get when the server stops.
    """

    host: str = LOCAL
    port: int = 8000
    names: tuple[str, ...] = ("model",)
    api_key: str | None = None
    cache_tokens: int | None = None
    batch: int = 32
    queue: int = 64
    max_tokens: int | None = None
    max_texts: int = 128
    body_bytes: int = 4 << 20
    timeout: float = 600.0
    grace: float = 10.0

    def __post_init__(self) -> None:
        for name in ("batch", "queue", "max_texts", "body_bytes", "timeout"):
            if not getattr(self, name) > 0:
                raise BadArgumentError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, expected more than 0"
                )
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise BadArgumentError("--api-key is empty or not ASCII, expected some characters")
