"""A data file as a source of windows: running text, or records one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ms_quant.data.files import Kind, open_text
from ms_quant.data.json_records import Value, is_json, read_values
from ms_quant.data.parquet import read_rows
from ms_quant.data.records import RECORD_KEYS, Content, parse_record
from ms_quant.data.windows import Passage, text_passages
from ms_quant.errors import BadFileError

Reader = Callable[[Counter[str]], Iterator[Value]]
"""Reads a file from its beginning, and counts by their keys values that are in no record."""


@dataclass(frozen=True)
class TextSource:
    """The passages of a running text.

    Attributes:
        path: the file.
        size: its characters.
    """

    path: Path
    size: int

    def passages(self) -> Iterator[Passage]:
        return text_passages(open_text(self.path))


class RecordSource:
    """The records of a file that hold anything, as passages.

    Args:
        path (Path): the file.
        size (int): its characters; 0 is not known.
        records (Reader): reads it from the beginning.
        render (Callable): what a record holds, and where it is, to a text or ids.
        passed_over (Callable): keys of what a record holds that `render` does not write.

    Attributes:
        unused: how many of the records that were read last hold something under a key that is no
            part of the text, by key.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        records: Reader,
        render: Callable[[Content, str], str | np.ndarray],
        passed_over: Callable[[Content], set[str]],
    ):
        self.path, self.records, self.render = path, records, render
        self.passed_over = passed_over
        self.unused: Counter[str] = Counter()
        self.size = size or sum(value.length for value in records(Counter()))

    def passages(self) -> Iterator[Passage]:
        kind: type | None = None
        unused = self.unused = Counter[str]()
        for value in self.records(unused):
            content = parse_record(value.value, value.where, unused)
            if content is None:
                continue
            unused.update(self.passed_over(content))
            if kind is not None and (kind is np.ndarray) != isinstance(content, np.ndarray):
                raise BadFileError(
                    f"{value.where}: only some records are token ids, expected all or none"
                )
            kind = type(content)
            read = partial(self.render, content, value.where)
            yield Passage(value.start, value.length, True, read)
        if kind is None:
            raise BadFileError(f"{self.path}: has only empty records, expected text or token ids")


def record_reader(path: Path, kind: Kind) -> Reader | None:
    """What reads the records of a file; None where it is running text."""
    if kind is Kind.PARQUET:
        return partial(read_rows, path)
    if kind is Kind.JSON or is_json(path):
        return partial(read_values, path, RECORD_KEYS)
    return None


def holds_ids(records: Reader) -> bool:
    """Whether the first record that is not empty holds token ids."""
    found = (parse_record(value.value, value.where) for value in records(Counter()))
    return isinstance(next((content for content in found if content is not None), None), np.ndarray)
