"""What clients are told of errors, in OpenAI's shape."""

from __future__ import annotations

from typing import Any


class RefusedError(Exception):
    """A request is refused.

    Args:
        message: one sentence.
        status: of HTTP.
        kind: OpenAI's ``type``.
        param: the field that is wrong, if one is.
        headers: what is sent beside it.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.headers = status, kind, param, headers or {}

    def as_json(self) -> dict[str, Any]:
        """The body."""
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.status,
            }
        }


def busy(queue: int) -> RefusedError:
    """Too many requests wait."""
    return RefusedError(
        f"{queue} requests wait already, try again later",
        503,
        "overloaded_error",
        headers={"Retry-After": "5"},
    )


def stopping() -> RefusedError:
    """The server stops."""
    return RefusedError(
        "the server is stopping", 503, "overloaded_error", headers={"Retry-After": "30"}
    )


def too_late(seconds: float) -> RefusedError:
    """A request took too long."""
    return RefusedError(f"the request took longer than {seconds:g} s", 504, "timeout_error")


def internal() -> RefusedError:
    """Something broke; what it was the log says."""
    return RefusedError("the server failed on this request, its log says why", 500, "server_error")
