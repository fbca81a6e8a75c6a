"""Records of a Parquet file, some rows in memory at a time. Needs pyarrow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ms_quant.data.json_records import Value
from ms_quant.data.records import COLUMNS, RECORD_KEYS
from ms_quant.errors import BadFileError

MAX_GROUP_BYTES = 1 << 30
BATCH_ROWS = 64


def read_rows(path: Path, unused: Counter[str] | None = None) -> Iterator[Value]:
    """The rows of a file as records.

    Args:
        path (Path): the file.
        unused (Counter, optional): gets the columns that are not read. Default: ``None``, nobody
            asks.

    Raises:
        MsQuantError: pyarrow is missing, the file is malformed, has none of the columns, or a row
            group of it is too large.
    """

    def columns(file: Any) -> list[str]:
        present = file.schema_arrow.names
        if set(present).isdisjoint(RECORD_KEYS):
            raise BadFileError(
                f"{path}: has the columns {present!r:.80}, expected one of {', '.join(RECORD_KEYS)}"
            )
        names = [name for name in present if name in COLUMNS]
        if unused is not None:
            others = set(present).difference(names)
            unused.update(dict.fromkeys(others, file.metadata.num_rows))
        return names

    return _read(path, columns)


def read_columns(path: Path, names: Sequence[str]) -> Iterator[Value]:
    """The same of columns that must all be there.

    Args:
        path (Path): the file.
        names (Sequence[str]): the columns.
    """

    def columns(file: Any) -> list[str]:
        present = file.schema_arrow.names
        missing = [name for name in names if name not in present]
        if missing:
            raise BadFileError(
                f"{path}: has the columns {present!r:.80}, expected {missing[0]!r}, too: "
                f"{', '.join(names)}"
            )
        return list(names)

    return _read(path, columns)


def _read(path: Path, columns: Callable[[Any], list[str]]) -> Iterator[Value]:
    """The rows of a file, of the columns that a function chooses of the open file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BadFileError(
            f"{path}: reading Parquet needs pyarrow, expected: pip install 'ms-quant[parquet]', or "
            f"the data as JSON lines (.jsonl) ({error})"
        ) from None
    start = 0
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            names = columns(file)
            _require_small(file, names, path)
            rows = file.iter_batches(BATCH_ROWS, columns=names, use_threads=False)
            for number, value in enumerate((row for b in rows for row in b.to_pylist()), 1):
                size = _chars(value) + 1
                yield Value(value, f"{path}: row {number}", start, size)
                start += size
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise BadFileError(f"{path}: not a readable Parquet file ({reason:.200})") from None


def _require_small(file: Any, names: list[str], path: Path) -> None:
    """Refuses row groups that would fill the memory."""
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        columns = [group.column(i) for i in range(group.num_columns)]
        size = sum(
            c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in names
        )
        if size > MAX_GROUP_BYTES:
            raise BadFileError(
                f"{path}: row group {index} has {size} bytes, expected at most {MAX_GROUP_BYTES}: "
                "write it with smaller row groups"
            )


def _chars(value: Any) -> int:
    """About how long a record is as text."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_chars, value.values()))
    if isinstance(value, list):
        return sum(map(_chars, value))
    return 4
