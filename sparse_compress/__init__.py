"""UNZIP compression of quantized language models for the Atlas 300I Duo, on any machine.

The public names are imported when they are first used; none of them needs MindSpore.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "CodecError": "sparse_compress.codec",
    "CompressedMatrix": "sparse_compress.codec",
    "Price": "sparse_compress.codec",
    "compress_matrix": "sparse_compress.codec",
    "decompress_matrix": "sparse_compress.codec",
    "encoded_size": "sparse_compress.codec",
    "matrix_info": "sparse_compress.codec",
    "price": "sparse_compress.codec",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
