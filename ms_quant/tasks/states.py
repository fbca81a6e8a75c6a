"""Hidden states in a file that is written over, block after block."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ms_quant.files.atomic import disk_errors, free_space_check


class StateFile:
    """Rows of hidden states on disk.

    Args:
        path: the file, which is made new.
        rows: how many there will be.
        hidden: channels of each.

    Raises:
        MsQuantError: the disk has no room for it.
    """

    def __init__(self, path: Path, rows: int, hidden: int):
        free_space_check(path.parent, 4 * rows * hidden)
        self.path, self._rows, self._hidden = path, rows, hidden
        with disk_errors(path, "hidden states"):
            self._file = path.open("w+b", buffering=0)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, part: slice, /) -> np.ndarray:
        """float32 (rows, hidden), copied out of the file."""
        first, stop, _ = part.indices(self._rows)
        return self.read(first, stop - first)

    def read(self, first: int, count: int) -> np.ndarray:
        """So many rows from one on, float32 (count, hidden)."""
        found = np.empty((count, self._hidden), np.float32)
        with disk_errors(self.path, "hidden states"):
            self._file.seek(4 * first * self._hidden)
            rest = found.reshape(-1).view(np.uint8).data
            while len(rest):
                done = self._file.readinto(rest)
                if not done:
                    raise OSError("the file is shorter than what was written")
                rest = rest[done:]
        return found

    def write(self, first: int, rows: np.ndarray) -> None:
        """Writes rows from one on."""
        rest = np.ascontiguousarray(rows, np.float32).reshape(-1).view(np.uint8).data
        with disk_errors(self.path, "hidden states"):
            self._file.seek(4 * first * self._hidden)
            while len(rest):
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Closes the file and removes it."""
        self._file.close()
        self.path.unlink(missing_ok=True)
