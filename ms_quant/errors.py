"""The exceptions that a user is meant to read, and how values are shown in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_PARTS = re.compile(r"(?P<found>.*?)[,;]? expected (?P<expected>.*)", re.DOTALL)


class MsQuantError(ValueError):
    """Bad input, said in one sentence: what was named, what was found, what was expected.

    The commands print the message and leave with a non-zero status; no traceback is shown. The
    subclasses tell the cause.

    Attributes:
        found: the part of the sentence that names the place and says what was found there.
        expected: what was expected instead; "" where the sentence does not say.
    """

    def __init__(self, message: str = ""):
        super().__init__(message)
        parts = _PARTS.fullmatch(message)
        self.found, self.expected = parts.groups() if parts else (message, "")


class BadArgumentError(MsQuantError):
    """An argument or an option has a value that it may not have, or does not go with another."""


class BadFileError(MsQuantError):
    """A file or a directory is not there, is malformed, or holds what contradicts the rest."""


class UnsupportedError(MsQuantError):
    """What was asked for is well-formed, and no format, runtime or device here can do it."""


class JobConflictError(MsQuantError):
    """A job or an output on disk belongs to other arguments, or another process works on it."""


class DiskError(MsQuantError):
    """The disk does not take or give a file: it is full, or access is refused."""


def short(value: Any, longest: int = 120) -> str:
    """A value for a message; of a long one its kind, and of an object its keys."""
    text = repr(value)
    if len(text) <= longest:
        return text
    if isinstance(value, Mapping):
        keys = ", ".join(str(key)[:20] for key in list(value)[:4])
        return f"an object of {len(value)} keys ({keys}, ...)"
    if isinstance(value, list):
        return f"a list of {len(value)} values"
    return f"{text[:40]}... ({len(text)} characters)"
