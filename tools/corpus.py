"""The text that every machine has: Python's own standard library source, split by file."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

# Tables rather than text, copies of other projects, and what is generated on each machine.
LEFT_OUT = (
    "site-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
    "ensurepip",
    "lib2to3",
    "_sysconfigdata",
    "config-",
)
CALIBRATION_SHARE, HELDOUT_SHARE = 0.04, 0.04


def library_files(root: Path | None = None) -> list[tuple[str, str]]:
    """(relative path, text) of every Python file of the standard library, sorted by path."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        tests = "test" in relative.parts[:-1]
        if tests or any(part.startswith(LEFT_OUT) for part in relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            files.append((relative.as_posix(), text))
    return files


def split(files: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Splits by a hash of the path: train, calibration, heldout. No file is in two of them."""
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "calibration": [], "heldout": []}
    for path, text in files:
        share = int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) / 2**32
        if share < HELDOUT_SHARE:
            parts["heldout"].append((path, text))
        elif share < HELDOUT_SHARE + CALIBRATION_SHARE:
            parts["calibration"].append((path, text))
        else:
            parts["train"].append((path, text))
    return parts
