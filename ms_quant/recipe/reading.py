"""Reading a recipe key by key, so that every refusal names the path of its key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from ms_quant.errors import BadFileError, UnsupportedError

REQUIRED = object()


def refuse(where: str, found: Any, possible: str, why: str = "") -> NoReturn:
    """Says what a key holds and what it may hold.

    Raises:
        MsQuantError: always.
    """
    reason = f" ({why})" if why else ""
    raise BadFileError(f"{where} is {found!r:.80}{reason}, expected {possible}")


def listed(names: Iterable[Any]) -> str:
    """Choices, for a sentence."""
    found = [str(name).lower() if isinstance(name, bool) else str(name) for name in names]
    return found[0] if len(found) == 1 else f"one of {', '.join(found)}"


def items(value: Any, where: str) -> list[tuple[str, Any]]:
    """The elements of a list with their paths.

    Raises:
        MsQuantError: it is no list.
    """
    if not isinstance(value, list | tuple):
        refuse(where, value, "a list")
    return [(f"{where}[{index}]", element) for index, element in enumerate(value)]


class Section:
    """A mapping of a recipe.

    Args:
        value: what is in its place.
        where: its path; "" for the whole recipe.
        known: the keys that it may have; None for any.
        refused: keys that are refused with a reason.

    Raises:
        MsQuantError: it is no mapping, or has another key.
    """

    def __init__(
        self,
        value: Any,
        where: str,
        known: Iterable[str] | None = None,
        refused: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(value, Mapping):
            refuse(where or "the recipe", value, "a mapping")
        self.value, self.where = value, where
        names = None if known is None else list(known)
        for key in value:
            if refused and key in refused:
                raise UnsupportedError(f"{self.path(key)}: is not supported, {refused[key]}")
            if not isinstance(key, str) or (names is not None and key not in names):
                expected = "text" if names is None else listed(names)
                raise BadFileError(f"{self.path(key)}: is no known key, expected {expected}")

    def __contains__(self, key: str) -> bool:
        return key in self.value

    def path(self, key: Any) -> str:
        return f"{self.where}.{key}" if self.where else f"{key}"

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        if key in self.value:
            return self.value[key]
        if default is REQUIRED:
            raise BadFileError(f"{self.path(key)}: is missing")
        return default

    def one_of(
        self, key: str, possible: Iterable[Any], default: Any = REQUIRED, why: str = ""
    ) -> Any:
        """A value that is one of some, 1 being no true; ``why`` there are no others."""
        value, choices = self.get(key, default), list(possible)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            refuse(self.path(key), value, listed(choices), why)
        return value

    def text(self, key: str, default: Any = REQUIRED) -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            refuse(self.path(key), value, "text")
        return value

    def file(self, key: str, default: Any = REQUIRED) -> str:
        """The name of a file."""
        name = self.text(key, default)
        if not name:
            refuse(self.path(key), name, "the name of a file")
        return name

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        return self.one_of(key, (True, False), default)

    def integer(self, key: str, default: Any = REQUIRED, least: int = 0) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < least:
            refuse(self.path(key), value, f"an integer of at least {least}")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """A number; text that spells one counts, as YAML 1.1 reads ``1e-5`` as text."""
        value = self.get(key, default)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            refuse(self.path(key), value, "a number")
        return number

    def texts(self, key: str, default: Iterable[str]) -> tuple[str, ...]:
        found = items(self.get(key, list(default)), self.path(key))
        for where, value in found:
            if not isinstance(value, str):
                refuse(where, value, "text")
        return tuple(value for _, value in found)
