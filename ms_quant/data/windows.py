"""Windows of token ids from a source of any size, with as little tokenized as they need.

A source is a run of passages: parts of a text, or records. A small one is tokenized whole, and the
windows are cut from its stream. Of a large one `samples` places are drawn, one in each of as many
equal stretches of the file, and one window is tokenized from each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

# The tokenizers library takes some 200 bytes of memory a token.
CHUNK_CHARS = 64 << 10
WHOLE_CHARS = 1 << 20
TOKEN_CHARS = 12  # of a file for one token: more than nearly all data have
USUAL_TOKEN_CHARS = 6
TRIES = 100  # of places to cut at
LEAST_CHARS = 1024  # that are tokenized at once
_SPACE = re.compile(r"\s")


@dataclass(frozen=True)
class Passage:
    """A part of a source.

    Attributes:
        start: characters of the file before it.
        length: characters of the file that it takes.
        begins: whether a record begins here; else it goes on from the passage before.
        read: its text, or its ids.
    """

    start: int
    length: int
    begins: bool
    read: Callable[[], str | np.ndarray]


class Source(Protocol):
    """What windows are made of: `size` characters, in passages, each time from the beginning."""

    @property
    def size(self) -> int: ...

    def passages(self) -> Iterator[Passage]: ...


class Encoder(Protocol):
    """Text to ids, and what stands between records: one id or none."""

    @property
    def between(self) -> np.ndarray: ...

    def encode(self, text: str, begins: bool) -> np.ndarray: ...


def split_text(text: str, size: int) -> Iterator[str]:
    """Parts of about `size` characters, cut where tokenizers cut, too."""
    start = 0
    while len(text) - start > size:
        end = _cut(text, start, start + size)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _cut(text: str, start: int, end: int) -> int:
    """After the last newline, or before the last space, best without white space beside it."""
    loose = 0
    for char, after in (("\n", 1), (" ", 0)):
        at = text.rfind(char, start + 1, end)
        loose = loose or (at + after if at > start else 0)
        for _ in range(TRIES):
            if at <= start:
                break
            around = text[at - 1] + text[at + 1 : at + 2]
            if len(around) == 2 and not _SPACE.search(around):
                return at + after
            at = text.rfind(char, start + 1, at)
    return loose or end


def text_passages(parts: Iterator[str]) -> Iterator[Passage]:
    """Passages of a running text that comes in parts."""
    start, held = 0, ""
    for part in parts:
        pieces = list(split_text(held + part, CHUNK_CHARS))
        held = pieces.pop()
        for piece in pieces:
            yield _of_text(piece, start)
            start += len(piece)
    if held:
        yield _of_text(held, start)


def _of_text(text: str, start: int) -> Passage:
    return Passage(start, len(text), start == 0, lambda: text)


def stream(source: Source, encoder: Encoder) -> Iterator[np.ndarray]:
    """The ids of a source in order, in pieces."""
    first = True
    for passage in source.passages():
        if passage.begins and not first:
            yield encoder.between
        first = False
        yield from _ids(encoder, passage.read(), passage.begins)


def _ids(encoder: Encoder, content: str | np.ndarray, begins: bool) -> Iterator[np.ndarray]:
    if isinstance(content, np.ndarray):
        yield content
        return
    for piece in split_text(content, CHUNK_CHARS):
        yield encoder.encode(piece, begins)
        begins = False


def needs_whole(source: Source, samples: int, length: int) -> bool:
    """Whether a source is so small that all of it is tokenized."""
    return source.size <= max(WHOLE_CHARS, TOKEN_CHARS * samples * length)


def draw(
    source: Source, encoder: Encoder, samples: int, length: int, seed: int
) -> np.ndarray | None:
    """Windows of a source that is not small, or None if it has too few tokens for its size.

    Args:
        source (Source): texts or ids.
        encoder (Encoder): text to ids.
        samples (int): how many windows.
        length (int): tokens of each.
        seed (int): of the places.
    """
    for share in (1.0, 0.5):  # its end may be poor in tokens
        size = int(share * source.size)
        found = list(_windows_at(_places(size, samples, length, seed), source, encoder, length))
        if len(found) == samples:
            return np.stack(found)
    return None


def _windows_at(
    drawn: np.ndarray, source: Source, encoder: Encoder, length: int
) -> Iterator[np.ndarray]:
    """Windows from drawn places of a source, in order, without overlap.

    A window begins where the record begins that holds its place; deep inside a long one, or in
    running text, at the next line, or the next word where no line ends nearby. It goes on into the
    records after it. What ends short at the end of the file is no window.
    """
    window = _Window(encoder, length)
    places = iter(drawn)
    place = next(places, None)
    for passage in source.passages():
        content, done = None, 0
        end = passage.start + passage.length
        while place is not None and (window.open or place < end):
            if content is None:
                content = passage.read()
            if window.open:
                window.go_on(passage.begins and done == 0)
            else:
                done = _beginning(content, passage, place, done, length)
                window.begin()
            done += window.take(content, done, passage.begins and done == 0)
            if window.open:
                break
            yield window.ids()
            place = next(places, None)


def _places(size: int, samples: int, length: int, seed: int) -> np.ndarray:
    """One in each stretch, and none so near the end that its window would be short."""
    stretch = (size - TOKEN_CHARS * length) / samples
    shares = np.random.default_rng(seed).random(samples)
    return ((np.arange(samples) + shares) * stretch).astype(np.int64)


def _beginning(
    content: str | np.ndarray, passage: Passage, place: int, done: int, length: int
) -> int:
    """Where in its passage a window begins; not before `done`, which others have."""
    at = max(0, place - passage.start) * len(content) // max(1, passage.length)
    if isinstance(content, np.ndarray):
        return max(done, at // length * length)
    if passage.begins and done == 0 and at < USUAL_TOKEN_CHARS * length:
        return 0
    at = max(done, at)
    line = content.find("\n", at, at + LEAST_CHARS)
    if line >= 0:
        return line + 1
    word = _SPACE.search(content, at, at + LEAST_CHARS)
    return word.start() if word else at


class _Window:
    """The window that is being filled."""

    def __init__(self, encoder: Encoder, length: int):
        self.encoder, self.length = encoder, length
        self.pieces: list[np.ndarray] = []
        self.open, self.held = False, 0

    def begin(self) -> None:
        self.pieces, self.open, self.held = [], True, 0

    def go_on(self, record: bool) -> None:
        if record and self.held:
            self._add(self.encoder.between)

    def take(self, content: str | np.ndarray, start: int, begins: bool) -> int:
        """Takes from `start` what the window lacks; returns how far it went in the content."""
        at = start
        while self.open and at < len(content):
            lacks = self.length - self.held
            if isinstance(content, np.ndarray):
                piece, ids = lacks, content[at : at + lacks]
            else:
                size = max(LEAST_CHARS, USUAL_TOKEN_CHARS * lacks)
                text = next(split_text(content[at : at + 2 * size], size))
                piece, ids = len(text), self.encoder.encode(text, begins and at == start)
            self._add(ids)
            at += piece
        return min(at, len(content)) - start

    def ids(self) -> np.ndarray:
        return np.concatenate(self.pieces)[: self.length]

    def _add(self, ids: np.ndarray) -> None:
        self.pieces.append(ids)
        self.held += len(ids)
        self.open = self.held < self.length
