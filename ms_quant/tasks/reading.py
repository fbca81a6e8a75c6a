"""Rows of data sets on disk, which nobody here has checked: one sentence for whatever is wrong."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ms_quant.data.json_records import read_values
from ms_quant.data.parquet import read_columns
from ms_quant.errors import BadArgumentError, BadFileError, short

MOST_CHARACTERS = 131_072  # of a field
MAX_BYTES = 1 << 30
LETTERS = "ABCD"


@dataclass(frozen=True)
class Row:
    """A row of a table or a record.

    Attributes:
        values: by name.
        where: file and line, for errors.
    """

    values: dict[str, Any]
    where: str

    def text(self, name: str) -> str:
        """A value that must be text.

        Raises:
            MsQuantError: it is not there, or something else.
        """
        if name not in self.values:
            raise BadFileError(f"{self.where}: has no {name!r}, expected it to be text")
        value = self.values[name]
        if not isinstance(value, str):
            raise BadFileError(f"{self.where}: {name} is {short(value)}, expected text")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise BadFileError(f"{self.where}: {name} is no UTF-8 text, expected text")
        return value

    def letter(self, name: str) -> int:
        """Which of A to D a value is, from 0.

        Raises:
            MsQuantError: it is none.
        """
        found = self.text(name).strip()
        if len(found) != 1 or found not in LETTERS:
            raise BadFileError(
                f"{self.where}: {name} is {short(found)}, expected one of A, B, C and D"
            )
        return LETTERS.index(found)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, none of them empty.

        Raises:
            MsQuantError: it is something else.
        """
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) < 2:
            raise BadFileError(
                f"{self.where}: {name} is {short(value)}, expected a list of two texts and more"
            )
        found = tuple(Row({name: one}, self.where).text(name) for one in value)
        if not all(found):
            raise BadFileError(f"{self.where}: {name} has an empty text, expected some")
        return found

    def index(self, name: str, count: int) -> int:
        """Which of so many choices a value says, a number or its digits.

        Raises:
            MsQuantError: it is none.
        """
        value = self.values.get(name)
        if isinstance(value, str) and value.isdecimal() and len(value) < 9:
            value = int(value)
        if type(value) is not int or not 0 <= value < count:
            raise BadFileError(
                f"{self.where}: {name} is {short(value)}, expected a number from 0 to {count - 1}"
            )
        return value


def checked_file(path: Path) -> Path:
    """The file, if it is one of a size that a data set has.

    Raises:
        MsQuantError: it is not.
    """
    if not path.is_file():
        raise BadFileError(f"{path}: is not a file, expected questions")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise BadFileError(f"{path}: has {size} bytes, expected at most {MAX_BYTES}")
    return path


def csv_rows(path: Path, columns: Sequence[str], header: bool = True) -> Iterator[Row]:
    """The rows of a csv file.

    Args:
        path: the file, UTF-8.
        columns: names that must be in its first row; the names of all columns where it has no
            such row.
        header: whether it has.

    Raises:
        MsQuantError: the file is malformed, or a column is missing.
    """
    names = list(columns)
    try:
        with checked_file(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                where = f"{path}: line {reader.line_num}"
                if any(len(field) > MOST_CHARACTERS for field in row):  # csv's own limit is global
                    raise csv.Error("a field is too long")
                if header:
                    names, header = row, False
                    _require_columns(path, columns, names)
                elif not row:
                    continue
                elif len(row) != len(names):
                    raise BadFileError(
                        f"{where}: has {len(row)} columns, expected {len(names)} "
                        f"({', '.join(map(str, names))})"
                    )
                else:
                    yield Row(dict(zip(names, row, strict=True)), where)
    except csv.Error as error:
        raise BadFileError(
            f"{path}: line {reader.line_num} is no csv ({error}), expected fields with commas "
            f"between them of at most {MOST_CHARACTERS} characters"
        ) from None
    except UnicodeDecodeError as error:
        raise BadFileError(f"{path}: is not UTF-8 ({error.reason}), expected csv") from None
    if header:
        raise BadFileError(f"{path}: is empty, expected the columns {', '.join(columns)}")


def _require_columns(path: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    missing = [name for name in columns if name not in names]
    if missing:
        raise BadFileError(
            f"{path}: has the columns {short(list(names))}, expected {missing[0]!r}, too: "
            f"{', '.join(columns)}"
        )


def json_rows(path: Path, keys: Collection[str]) -> Iterator[Row]:
    """The records of a file of JSON lines.

    Raises:
        MsQuantError: it is malformed; names the line.
    """
    for found in read_values(checked_file(path), keys):
        if not isinstance(found.value, dict):
            raise BadFileError(f"{found.where}: is {short(found.value)}, expected an object")
        yield Row(found.value, found.where)


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Some columns of a Parquet file.

    Raises:
        MsQuantError: it is malformed, or a column is missing.
    """
    for found in read_columns(checked_file(path), columns):
        yield Row(found.value, found.where)


def first_file(directory: Path, patterns: Sequence[str], what: str) -> Path:
    """The first file that one of some patterns finds in a directory.

    Raises:
        MsQuantError: there is none.
    """
    for pattern in patterns:
        found = sorted(path for path in directory.glob(pattern) if path.is_file())
        if found:
            return found[0]
    raise BadFileError(f"{directory}: has no {what}, expected {' or '.join(patterns)}")


def require_directory(directory: Path, task: str) -> None:
    """Refuses what is no directory."""
    if not directory.is_dir():
        raise BadArgumentError(
            f"--data {directory}: is not a directory, expected that of {task}'s files"
        )
