"""JSON records from a file of any size, one in memory at a time."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ms_quant.data.files import open_text
from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.files.strict_json import without_duplicates

MAX_RECORD_CHARS = 8 << 20
LIST_KEYS = ("data", "train", "rows", "records", "examples", "samples", "instances", "items")
_SPACE = re.compile(r"[ \t\r\n]*")
_BEGUN = re.compile(r"""\{\s*["']|\[\s*'|\[\s*\{\s*["']""")
WHITE = " \t\r\n"
_NEAR = 20  # characters; an error this close to the end of what was read may be its end
_JUDGED = ("{", "[", '"')


class NotJsonError(BadFileError):
    """What is read is no JSON."""


class TooLongError(BadFileError):
    """A value has more than ``MAX_RECORD_CHARS``."""


@dataclass(frozen=True)
class Value:
    """One JSON value of a file.

    Attributes:
        value: as Python objects.
        where: the file and the line or the number of the record.
        start: the characters of the file before it.
        length: its characters.
    """

    value: Any
    where: str
    start: int
    length: int


class JsonReader:
    """Values of a text one after the other.

    Args:
        path (Path): the file, UTF-8.
    """

    def __init__(self, path: Path):
        self.path = path
        self.parts = open_text(path)
        self.text, self.at = "", 0
        self.line, self.line_start, self.passed = 1, 0, 0
        self.decoder = json.JSONDecoder(object_pairs_hook=without_duplicates)

    @property
    def position(self) -> int:
        """Characters of the file before what comes next."""
        return self.passed + self.at

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self._advance(match.end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self) -> str:
        """Takes the next character that is no white space."""
        char = self.peek()
        self._advance(self.at + len(char))
        return char

    def value(self, where: str) -> Value:
        """Takes the next value.

        Args:
            where (str): names it in errors.

        Raises:
            MsQuantError: it is not JSON, or longer than ``MAX_RECORD_CHARS``.
        """
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                self._need_more(error, where)
                continue
            except RecursionError:
                raise BadFileError(f"{where} is not valid JSON (nested too deeply)") from None
            except ValueError as error:
                reason = "a number has too many digits" if "digits" in str(error) else error
                raise BadFileError(f"{where} is not valid JSON ({reason})") from None
            if end == len(self.text) and isinstance(value, (int, float)) and self._more():
                continue  # its digits may go on
            start, length = self.position, end - self.at
            if length > MAX_RECORD_CHARS:
                raise _too_long(where)
            self._advance(end)
            return Value(value, where, start, length)

    def _need_more(self, error: json.JSONDecodeError, where: str) -> None:
        """Reads on if the value may have been cut off; else it is wrong."""
        cut = "Unterminated" in error.msg or error.pos >= len(self.text) - _NEAR
        held = len(self.text) - self.at
        if cut and held > MAX_RECORD_CHARS:
            raise _too_long(where)
        reason, at = self._reason(error)
        place = self._place(at, where)
        if not cut or not self._more(min(held, MAX_RECORD_CHARS + 1 - held)):
            raise NotJsonError(f"{where} is not valid JSON ({reason}: {place})") from None

    def _reason(self, error: json.JSONDecodeError) -> tuple[str, int]:
        """What is wrong with a value, and where in the text that is held."""
        before = self.text[self.at : error.pos].rstrip(WHITE)
        found = self.text[error.pos :].lstrip(WHITE)[:1]
        if error.pos == self.at and found == ",":
            return "a comma between records, expected them without, or in one list [...]", error.pos
        if before.endswith(",") and found and found in "}]":
            return f"a comma before {found}", self.at + len(before) - 1
        return error.msg, error.pos

    def _place(self, at: int, where: str) -> str:
        """Line and character of the text that is held; without the line where `where` has it."""
        line = self.line + self.text.count("\n", self.at, at)
        start = self.text.rfind("\n", self.at, at) + 1
        column = self.passed + at - self.line_start if not start else at - start
        place = f"character {column + 1}"
        return place if where.endswith(f": line {line}") else f"line {line}, {place}"

    def _advance(self, end: int) -> None:
        newlines = self.text.count("\n", self.at, end)
        if newlines:
            self.line += newlines
            self.line_start = self.passed + self.text.rfind("\n", self.at, end) + 1
        self.at = end

    def _more(self, least: int = 1) -> bool:
        """Reads some more, as much as is held again, so that long values are parsed a few times."""
        parts, size = [], 0
        for part in self.parts:
            parts.append(part)
            size += len(part)
            if size >= least:
                break
        self.passed += self.at
        self.text, self.at = "".join([self.text[self.at :], *parts]), 0
        return size > 0


def _too_long(where: str) -> TooLongError:
    return TooLongError(
        f"{where} is longer than {MAX_RECORD_CHARS} characters, expected smaller records: a list "
        "of them, or one a line"
    )


def read_values(
    path: Path, keys: Collection[str], unused: Counter[str] | None = None
) -> Iterator[Value]:
    """The records of a file, in order.

    They stand one after the other, are the elements of one list, or of one list inside an object.

    Args:
        path (Path): the file.
        keys (Collection[str]): an object with any of them is a record itself.
        unused (Counter, optional): gets what stands in an object beside its list. Default:
            ``None``, nobody asks.

    Raises:
        MsQuantError: the file is not JSON of such a kind.
    """
    reader, unused = JsonReader(path), Counter() if unused is None else unused
    if reader.peek() == "[" and _is_list_of_records(path):
        yield from _elements(reader)
        if reader.peek():
            raise BadFileError(
                f"{path}: line {reader.line} goes on after the list, expected one list alone"
            )
        return
    first = True
    while reader.peek():
        try:
            found = reader.value(f"{path}: line {reader.line}")
        except TooLongError:
            if not first:
                raise
            yield from _members(JsonReader(path), keys, unused)
            return
        first = False
        inner = _inner_list(found, keys)
        if inner is None:
            yield found
            continue
        key, values = inner
        unused.update(f"{k} beside the list" for k, v in found.value.items() if k != key and v)
        share = found.length // max(1, len(values))
        for number, value in enumerate(values):
            where = f"{found.where}, {key}, record {number + 1}"
            yield Value(value, where, found.start + number * share, share)


def is_json(path: Path) -> bool:
    """Whether a file that is not named so holds JSON: it begins as JSON does, or as Python writes
    such values, or its first value is an object or a list."""
    reader = JsonReader(path)
    opening = reader.peek()
    if opening not in ("{", "["):
        return False
    if _BEGUN.match(reader.text, reader.at):
        return True
    try:
        if opening == "{":
            return bool(reader.value("").value)
        reader.take()
        if reader.peek() in _JUDGED:
            reader.value("")
            return reader.take() in (",", "]")
        reader = JsonReader(path)
        return bool(reader.value("").value) and reader.peek() in ("", "[")
    except NotJsonError:
        return False
    except MsQuantError:  # its reader will say so
        return True


def is_message(value: Any) -> bool:
    """Whether a value is one message of a conversation."""
    pairs = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
    return isinstance(value, dict) and any(pair <= value.keys() for pair in pairs)


def _is_list_of_records(path: Path) -> bool:
    """Whether a list that begins a file holds records; else it is one: a conversation, or ids."""
    reader = JsonReader(path)
    reader.take()
    if reader.peek() not in _JUDGED:
        return False
    return not is_message(reader.value(f"{path}: record 1").value)


def _members(reader: JsonReader, keys: Collection[str], unused: Counter[str]) -> Iterator[Value]:
    """The elements of the list of an object that is the whole file, and too long for one value.

    Raises:
        MsQuantError: it is no such object.
    """
    reader.peek()
    where, lists, char = f"{reader.path}: line {reader.line}", 0, reader.take()
    while char in ("{", ","):
        name = reader.value(where).value
        if reader.take() != ":" or not isinstance(name, str) or name in keys:
            raise _too_long(where)
        if name in LIST_KEYS and reader.peek() == "[":
            lists += 1
            yield from _elements(reader)
        else:
            value = reader.value(f"{where}, {name!r:.40}").value
            unused.update([f"{name} beside the list"] if value else [])
        char = reader.take()
    if char != "}" or lists != 1 or reader.peek():
        raise _too_long(where)


def _elements(reader: JsonReader) -> Iterator[Value]:
    reader.take()
    for number in count(1):
        if number == 1 and reader.peek() == "]":
            reader.take()
            return
        where = f"{reader.path}: record {number}"
        yield reader.value(where)
        line, char = reader.line, reader.take()
        if char == "]":
            return
        if char != ",":
            found = repr(char) if char else "the end of the file"
            raise BadFileError(
                f"{where} is not followed by , or ] but by {found} (line {line}), expected JSON"
            )
        line = reader.line
        if reader.peek() == "]":
            raise NotJsonError(
                f"{where} is the last, expected no comma after it (line {line}) but ] alone"
            )


def _inner_list(found: Value, keys: Collection[str]) -> tuple[str, list[Any]] | None:
    """The only list of an object that is no record itself."""
    if not isinstance(found.value, dict) or not found.value.keys().isdisjoint(keys):
        return None
    lists = [key for key in LIST_KEYS if isinstance(found.value.get(key), list)]
    if not lists:
        return None
    if len(lists) > 1:
        raise BadFileError(f"{found.where} holds the lists {' and '.join(lists)}, expected one")
    return lists[0], found.value[lists[0]]
