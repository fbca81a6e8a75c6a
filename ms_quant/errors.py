"""The one exception a user is meant to read, and how values are shown in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class MsQuantError(ValueError):
    """Bad input, said in one sentence: what was named, what was found, what was expected.

    The commands print the message and leave with a non-zero status; no traceback is shown.
    """


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
