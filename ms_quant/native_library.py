"""Finding the compiled libraries of this distribution. Without them NumPy does the work."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_SUFFIXES = {".so", ".dll", ".dylib"}


def load_library(
    package: str, stem: str, version_of: str, version: int, what: str
) -> tuple[ctypes.CDLL | None, str]:
    """A library, or None and the reason why it is not there.

    Args:
        package: the package that it lies in.
        stem: its file's name without the suffix.
        version_of: name of its function that gives the version of its interface.
        version: what that must be.
        what: it is called so in the reason.

    Returns:
        the library and its path; or None and a sentence.
    """
    # An editable install keeps the library apart from the sources; __path__ lists both places.
    folders = sys.modules[package].__path__
    found = [path for folder in folders for path in sorted(Path(folder).glob(f"{stem}*"))]
    for path in found:
        if path.suffix in _SUFFIXES:
            try:
                library = ctypes.CDLL(str(path))
                built = getattr(library, version_of)()
            except (OSError, AttributeError) as error:
                return None, f"{what} does not load ({error}); using the NumPy reference"
            if built != version:
                return None, f"{path} is out of date: install again; using the NumPy reference"
            return library, str(path)
    return None, (
        f"{what} not built (no C++ compiler at install time); using the NumPy reference, slower"
    )
