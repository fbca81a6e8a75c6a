"""Values of ``config.json`` by their keys, each checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ms_quant.errors import BadFileError


def positive_int(raw: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A positive integer; ``default`` where the key is absent or null.

    Raises:
        MsQuantError: it is none.
    """
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise BadFileError(f"{where}: the key {key!r:.80} is missing, expected a positive integer")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise BadFileError(f"{where}: {key} is {value!r:.80}, expected a positive integer")
    return value


def count(raw: Mapping[str, Any], key: str, where: str, most: int) -> int:
    """An integer from 0 to ``most``; 0 where the key is absent or null.

    Raises:
        MsQuantError: it is none.
    """
    value = raw.get(key)
    value = 0 if value is None else value
    if type(value) is not int or not 0 <= value <= most:
        raise BadFileError(f"{where}: {key} is {value!r:.80}, expected 0 to {most}")
    return value


def flag(rule: bool | str, raw: Mapping[str, Any], where: str) -> bool:
    """What a rule says, or the key that it names.

    Raises:
        MsQuantError: the key is neither true nor false.
    """
    if isinstance(rule, bool):
        return rule
    value = raw.get(rule)
    if value is not None and not isinstance(value, bool):
        raise BadFileError(f"{where}: {rule} is {value!r:.80}, expected true or false")
    return bool(value)


def number(raw: Mapping[str, Any], key: str, where: str) -> float:
    """A positive number.

    Raises:
        MsQuantError: it is none.
    """
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise BadFileError(f"{where}: {key} is {value!r:.80}, expected a positive number")
    return float(value)
