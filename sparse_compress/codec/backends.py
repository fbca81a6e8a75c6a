"""Which of the two codecs does the work."""

from __future__ import annotations

import os
from types import ModuleType

from sparse_compress.codec import native, reference
from sparse_compress.codec.format import CodecError

CORES = os.cpu_count() or 1
"""How many threads code one tensor where nobody says otherwise."""


def backend_name(backend: str | None = None) -> str:
    """Tell which backend a call would use.

    Args:
        backend: "native", "reference", or None for the fastest one there is.

    Returns:
        "native" or "reference".

    Raises:
        CodecError: when `backend` is neither, or is "native" and the library is not there.
    """
    if backend not in (None, "native", "reference"):
        raise CodecError(f"backend is {backend!r}; expected 'native', 'reference' or None")
    library, problem = native.load()
    if backend == "native" and library is None:
        raise CodecError(f"the native backend was asked for, but: {problem}")
    return backend or ("reference" if library is None else "native")


def backend_note() -> str | None:
    """Tell the user why coding is slow.

    Returns:
        One sentence when the native codec is missing, else None.
    """
    return native.load()[1]


def get_backend(backend: str | None) -> ModuleType:
    """The module that codes, by the name that :func:`backend_name` takes."""
    return native if backend_name(backend) == "native" else reference
