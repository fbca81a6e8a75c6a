"""Which files of an output in progress are finished, and what each was when it was written.

One line a file, added when the file has its name: a checksum of the line, then JSON. A line that a
kill cut off, or that has changed, says nothing, and its file is written again.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from threading import Lock

from ms_quant.files.atomic import FileRecord, disk_errors
from ms_quant.files.own import open_own, require_own_file

WRITTEN = ".ms_quant.written"
MAX_BYTES = 256 << 20


class WrittenFiles:
    """The list, new or begun.

    Args:
        directory: of the output in progress.

    Raises:
        MsQuantError: something else than a file stands under its name, or it cannot be read.
    """

    def __init__(self, directory: Path):
        self.path, self._lock = directory / WRITTEN, Lock()
        self._known = dict[str, FileRecord]()
        require_own_file(self.path)
        if self.path.exists():
            with (
                disk_errors(self.path, "the list of finished files"),
                os.fdopen(open_own(self.path, os.O_RDONLY), "rb") as file,
            ):
                found = map(_parsed, file.read(MAX_BYTES).split(b"\n"))
                self._known = {record.name: record for record in found if record is not None}

    def __getitem__(self, name: str) -> FileRecord | None:
        return self._known.get(name)

    def add(self, record: FileRecord) -> None:
        """Notes a file that has its name; any thread may.

        Raises:
            MsQuantError: the disk does not take it.
        """
        with self._lock, disk_errors(self.path, "the list of finished files"):
            self._known[record.name] = record
            text = json.dumps([record.name, record.bytes, record.sha256]).encode()
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            with os.fdopen(open_own(self.path, flags), "ab", buffering=0) as file:
                file.write(b"\n%08x %s\n" % (zlib.crc32(text), text))
                os.fsync(file.fileno())


def _parsed(line: bytes) -> FileRecord | None:
    start, _, text = line.partition(b" ")
    if start != b"%08x" % zlib.crc32(text):
        return None
    return FileRecord(*json.loads(text)) if text else None
