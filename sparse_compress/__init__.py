"""UNZIP compression of quantized language models for the Atlas 300I Duo, on any machine.

The public names are imported when they are first used; none of them needs MindSpore.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_compress.codec import (
        CodecError,
        CompressedMatrix,
        Price,
        compress_matrix,
        decompress_matrix,
        encoded_size,
        matrix_info,
        price,
    )
    from sparse_compress.pipeline.compress_checkpoint import compress_checkpoint

__all__ = [
    "CodecError",
    "CompressedMatrix",
    "Price",
    "compress_checkpoint",
    "compress_matrix",
    "decompress_matrix",
    "encoded_size",
    "matrix_info",
    "price",
]

_COMPRESS = "compress_checkpoint"
_PUBLIC = {
    **dict.fromkeys(__all__, "sparse_compress.codec"),
    _COMPRESS: f"sparse_compress.pipeline.{_COMPRESS}",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
