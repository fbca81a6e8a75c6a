"""JSON read strictly: one meaning or one error."""

from __future__ import annotations

import codecs
import json
import math
import re
from pathlib import Path
from typing import Any

from ms_quant.errors import BadFileError

MAX_CONFIG_BYTES = 16 << 20
MAX_DEPTH = 64
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Args:
        path: the file.
        limit: its largest size in bytes.

    Raises:
        MsQuantError: there is no such file, it is too large, or :func:`parse_json` refuses it.
    """
    require_file(path)
    try:
        size = path.stat().st_size
        if size > limit:
            raise BadFileError(f"{path}: {size} bytes, expected at most {limit}")
        content = without_mark(path.read_bytes())
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        value = parse_json(content)
    except ValueError as error:
        raise BadFileError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadFileError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


def without_mark(content: bytes) -> bytes:
    """UTF-8 without the byte order mark that editors of Windows put before it."""
    return content.removeprefix(codecs.BOM_UTF8)


def require_file(path: Path) -> None:
    """Refuses a path that is no file.

    Raises:
        MsQuantError: it is a directory, or nothing is there.
    """
    if path.is_dir():
        raise BadFileError(f"{path}: is a directory, expected a file")
    if not path.is_file():
        raise BadFileError(f"{path}: no such file")


def parse_json(content: bytes) -> Any:
    """Any JSON value from UTF-8.

    Raises:
        ValueError: the text is no JSON, or has what parsers read in different ways: a key twice,
            NaN, infinity or a number that overflows to it, half of a surrogate pair, or more than
            64 levels of nesting.
    """
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} levels of nesting") from None
    if _deeper_than(value, MAX_DEPTH):
        raise ValueError(f"more than {MAX_DEPTH} levels of nesting")
    if _SURROGATE.search(content):
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r:.80} appears twice")
        result[key] = value
    return result


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text}, expected a finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40}, expected a finite number")
    return value


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(depth):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
    return bool(level)
