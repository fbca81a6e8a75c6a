"""Text from files as a page can show it."""

from __future__ import annotations

LONGEST = 300


def readable(value: object) -> str:
    """Text without control characters, surrogates and marks that turn its direction; long text is
    cut in its middle. Escaping it for HTML is the work of whoever puts it into a page."""
    text = "".join(one if _is_plain(one) else "\N{REPLACEMENT CHARACTER}" for one in str(value))
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]} … {text[-LONGEST // 3 :]}"


def _is_plain(one: str) -> bool:
    code = ord(one)
    turns = 0x200E <= code <= 0x200F or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    return one in "\n\t" or (one.isprintable() and not turns)
