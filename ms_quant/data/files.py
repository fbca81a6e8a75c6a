"""What a data file is: the formats that are read, those that are refused, and how text is read.

The suffix says which, in any case of letters, unless the content says otherwise: a file that begins
as an archive or a Parquet file is one whatever its name, and so is JSON under the name of a text.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ms_quant.errors import BadFileError

MAX_FILE_BYTES = 4 << 30
READ_CHARS = 1 << 20
EXPECTED = "expected text, JSON records, .parquet or token ids (.npz)"


class Kind(Enum):
    """How a file is read."""

    IDS = "ids"
    JSON = "json"
    PARQUET = "parquet"
    TEXT = "text"


@dataclass(frozen=True)
class Format:
    """A row of the table of formats.

    Attributes:
        suffixes: in small letters; () is any other suffix.
        kind: how it is read, or None if it is refused.
        what: what such a file holds.
        advice: what to do where it is refused, else how it is read.
        magic: what such files begin with.
    """

    suffixes: tuple[str, ...]
    kind: Kind | None
    what: str
    advice: str
    magic: tuple[bytes, ...] = ()


UNPACK = "unpack it first"
TO_LINES = "save it as JSON lines (.jsonl), one record a line"
TO_IDS = "save the token ids with numpy.savez (.npz)"
FORMATS = (
    Format((".npz", ".npy"), Kind.IDS, "token ids", "integers of one or two dimensions",
           (b"\x93NUMPY",)),
    Format((".jsonl", ".ndjson", ".json"), Kind.JSON, "JSON records",
           "one record after the other, a list of them, or an object around one list"),
    Format((".parquet",), Kind.PARQUET, "Parquet records", "with pyarrow; columns as JSON keys",
           (b"PAR1",)),
    Format((".csv", ".tsv"), None, "a table", TO_LINES),
    Format((".gz", ".tgz"), None, "gzip", UNPACK, (b"\x1f\x8b",)),
    Format((".zst",), None, "Zstandard", UNPACK, (b"\x28\xb5\x2f\xfd",)),
    Format((".xz",), None, "xz", UNPACK, (b"\xfd7zXZ\x00",)),
    Format((".bz2",), None, "bzip2", UNPACK, (b"BZh9",)),
    Format((".zip",), None, "a zip archive", UNPACK, (b"PK\x03\x04",)),
    Format((".tar", ".7z", ".rar", ".lz4"), None, "an archive", UNPACK, (b"7z\xbc\xaf", b"Rar!")),
    Format((".arrow", ".feather"), None, "Arrow data", "save it as .parquet or JSON lines (.jsonl)",
           (b"ARROW1", b"\xff\xff\xff\xff")),
    Format((".xlsx", ".xls", ".ods"), None, "a spreadsheet", TO_LINES),
    Format((".pdf", ".docx", ".doc", ".odt", ".pptx", ".epub", ".rtf"), None, "a document",
           "save its text (.txt)", (b"%PDF", b"{\\rtf")),
    Format((".pt", ".pth", ".bin", ".pkl", ".pickle", ".safetensors", ".mindrecord"), None,
           "binary data", TO_IDS, (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")),
    Format((".h5", ".hdf5", ".db", ".sqlite"), None, "a database", TO_LINES,
           (b"\x89HDF", b"SQLite format 3")),
    Format((), Kind.TEXT, "running text", "UTF-8; JSON in it is read as JSON records"),
)  # fmt: skip
OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer, not the data: git lfs pull",
    codecs.BOM_UTF32_LE: "UTF-32, expected UTF-8: iconv -f UTF-32 -t UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16, expected UTF-8: iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16, expected UTF-8: iconv -f UTF-16 -t UTF-8",
}


def find_kind(path: Path) -> Kind:
    """How a data file is read, but for JSON under another name.

    Raises:
        MsQuantError: the file is missing, empty, too large, or of a kind that is refused.
    """
    if path.is_dir():
        raise BadFileError(f"{path}: is a directory, expected a file of one of its data sets")
    if not path.exists():
        raise BadFileError(
            f"{path}: no such file, expected a data file (no data set is downloaded by its name)"
        )
    if not path.is_file():
        raise BadFileError(
            f"{path}: is no regular file, expected a data file that can be read twice"
        )
    size = path.stat().st_size
    if not 0 < size <= MAX_FILE_BYTES:
        raise BadFileError(f"{path}: {size} bytes, expected between 1 and {MAX_FILE_BYTES}")
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        head = file.read(64)
    if suffix == ".npz":  # what is wrong with one its reader says
        return Kind.IDS
    named = next((row for row in FORMATS if suffix in row.suffixes), FORMATS[-1])
    begun = [row for row in FORMATS if head.startswith(row.magic)]
    found = next((row for row in [named, *begun] if row.kind is None), None)
    if found is not None:
        raise BadFileError(f"{path}: is {found.what}, {EXPECTED}: {found.advice}")
    for magic, what in OTHERS.items():
        if head.startswith(magic):
            raise BadFileError(f"{path}: is {what}")
    kind = (begun or [named])[0].kind
    assert kind is not None
    return kind


def count_chars(path: Path) -> int:
    """How many characters a text has, all of them read.

    Raises:
        MsQuantError: it is not UTF-8, is binary, or has nothing but white space.
    """
    decoder, position, count, seen = codecs.getincrementaldecoder("utf-8-sig")(), 0, 0, False
    with path.open("rb") as file:
        while True:
            block = file.read(READ_CHARS)
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = position - waiting + error.start
                raise BadFileError(
                    f"{path}: is not UTF-8 at byte {at} (0x{error.object[error.start]:02x}), "
                    f"{EXPECTED} in UTF-8; iconv changes the encoding of text"
                ) from None
            if "\0" in text:
                raise BadFileError(f"{path}: holds NUL characters, is binary, {EXPECTED}")
            position += len(block)
            count += len(text)
            seen = seen or bool(text.strip())
            if not block:
                break
    if not seen:
        raise BadFileError(f"{path}: holds nothing but white space, {EXPECTED}")
    return count


def open_text(path: Path) -> Iterator[str]:
    """The text of a file in parts, each line ending as one newline, without a byte order mark."""
    with path.open(encoding="utf-8-sig") as file:
        while part := file.read(READ_CHARS):
            yield part
